"""The paper's losses, and the table of all: pure tensor maths on log-probabilities, in nats.

A new loss is one function here, one entry in `LOSSES` and one file in `config/loss`. The function's signature says what
it needs: see `Loss`.
"""

import functools

import torch
import torch.nn.functional as F

from objectives.declaration import (  # noqa: F401 (a loss of your own may need any of them)
    KL_ESTIMATE,
    LENGTHS,
    LOGPS,
    FlipProbability,
    Loss,
    NonNegative,
    Outputs,
    Positive,
    Range,
)
from objectives.with_reference import (
    chi_po_loss,
    dpo_nll_loss,
    dpop_loss,
    exo_loss,
    hinge_loss,
    kto_loss,
    length_dpo_loss,
    robust_dpo_loss,
)
from objectives.without_reference import cpo_loss, orpo_loss, simpo_loss


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
        reference_free: the *loss* takes the reference as uniform. As in the original, the rewards subtract the
            reference's log-probabilities as they are given; the trainers then load no reference and give zeros.

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
    "dpo": Loss(functools.partial(preference_loss, ipo=False)),
    "ipo": Loss(functools.partial(preference_loss, ipo=True, label_smoothing=0.0)),
    "robust_dpo": Loss(robust_dpo_loss),
    "hinge": Loss(hinge_loss),
    "dpop": Loss(dpop_loss),
    "dpo_nll": Loss(dpo_nll_loss),
    "length_dpo": Loss(length_dpo_loss),
    "exo": Loss(exo_loss),
    "chi_po": Loss(chi_po_loss),
    "kto": Loss(kto_loss),
    "simpo": Loss(simpo_loss),
    "orpo": Loss(orpo_loss),
    "cpo": Loss(cpo_loss),
}


def needs_reference(loss_config) -> bool:
    """True if the loss of a config's `loss` section compares the policy with a reference model."""
    return LOSSES[loss_config.name].needs_reference(loss_config)
