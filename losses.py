"""The paper's losses, and the table of all losses: pure tensor maths on log-probabilities, in nats.

A new loss is one function, here or in `objectives/`, one entry in `LOSSES` and one file in `config/loss`. The
function's signature says what it needs: see `Loss`.
"""

import functools

import torch
import torch.nn.functional as F

from objectives import whole_batch, with_reference, without_reference
from objectives.declaration import Loss, Memory, Outputs, WholeBatch  # noqa: F401 (for a loss of your own)
from objectives.mix import MIX, Mix
from objectives.options import FlipProbability, Momentum, NonNegative, OneOf, Positive, Range  # noqa: F401


def preference_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
    label_smoothing: FlipProbability = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DPO (https://arxiv.org/abs/2305.18290), conservative DPO or IPO loss of a batch of preference pairs.

    Args:
        policy_chosen_logps, policy_rejected_logps: log π(y|x) of the responses, shape (batch_size,).
        reference_chosen_logps, reference_rejected_logps: the same under the reference, shape (batch_size,).
        beta: temperature of the implied KL penalty; for IPO the regularization τ.
        label_smoothing: probability that a preference label is flipped, in [0, 0.5); 0 is plain DPO.
        ipo: use the IPO loss instead (label_smoothing does not apply).
        reference_free: compute the *loss* with a uniform reference. As in the original, the rewards still subtract the
            given log-probabilities of the reference; the trainers then load no reference and pass zeros.

    Returns: losses, chosen_rewards, rejected_rewards, each of shape (batch_size,); the rewards carry no gradient.
    """
    policy_logratios = policy_chosen_logps - policy_rejected_logps
    reference_logratios = 0 if reference_free else reference_chosen_logps - reference_rejected_logps
    logits = policy_logratios - reference_logratios  # h of the IPO paper

    if ipo:
        losses = (logits - 1 / (2 * beta)) ** 2  # Eq. 17 of https://arxiv.org/abs/2310.12036
    else:
        # Eq. 7 of the DPO paper at label_smoothing 0; Eq. 3 of https://ericmitchell.ai/cdpo.pdf otherwise
        losses = -F.logsigmoid(beta * logits) * (1 - label_smoothing) - F.logsigmoid(-beta * logits) * label_smoothing

    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


def sft_loss(policy_chosen_logps: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each response, shape (batch_size,): a sum over its tokens, as in the original."""
    return -policy_chosen_logps


LOSSES = {
    "sft": Loss(sft_loss),
    "sft_tokens": Loss(whole_batch.sft_tokens_loss),
    "dpo": Loss(functools.partial(preference_loss, ipo=False), margin_only=True),
    "ipo": Loss(functools.partial(preference_loss, ipo=True, label_smoothing=0.0), margin_only=True),
    "robust_dpo": Loss(with_reference.robust_dpo_loss, margin_only=True),
    "hinge": Loss(with_reference.hinge_loss, margin_only=True),
    "dpop": Loss(with_reference.dpop_loss),
    "dpo_nll": Loss(with_reference.dpo_nll_loss),
    "dpo_norm": Loss(with_reference.dpo_norm_loss),
    "length_dpo": Loss(with_reference.length_dpo_loss),
    "exo": Loss(with_reference.exo_loss, margin_only=True),
    "discopop": Loss(with_reference.discopop_loss, margin_only=True),
    "chi_po": Loss(with_reference.chi_po_loss),
    "apo_zero": Loss(with_reference.apo_zero_loss, unpaired=True),
    "apo_down": Loss(with_reference.apo_down_loss),
    "nca": Loss(with_reference.nca_loss, unpaired=True),
    "sppo": Loss(with_reference.sppo_loss, unpaired=True),
    "kto": Loss(with_reference.kto_loss, unpaired=True),
    "bco": Loss(whole_batch.bco_loss, unpaired=True),
    "beta_dpo": Loss(whole_batch.beta_dpo_loss),
    "aot": Loss(whole_batch.aot_loss),
    "aot_unpaired": Loss(whole_batch.aot_unpaired_loss, unpaired=True),
    "simpo": Loss(without_reference.simpo_loss),
    "orpo": Loss(without_reference.orpo_loss),
    "cpo": Loss(without_reference.cpo_loss),
}


def find_loss(loss_config) -> Loss | Mix:
    """Return the loss of a config's `loss` section: the named one, or a sum of several (`mix`)."""
    if loss_config.name == MIX:
        return Mix({name: LOSSES[name] for name in loss_config.parts})
    return LOSSES[loss_config.name]


def needs_reference(loss_config) -> bool:
    """True if the loss of a config's `loss` section compares the policy with a reference model."""
    return find_loss(loss_config).needs_reference(loss_config)
