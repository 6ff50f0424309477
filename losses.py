"""Preference and SFT losses, and sequence log-probabilities: pure tensor maths.

All log-probabilities are in nats. A new loss is one function here, one entry in `LOSSES` and one file in `config/loss`.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def preference_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
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
        reference_free: let the *loss* take the reference as uniform; the rewards returned still subtract it.

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


@dataclass(frozen=True)
class Loss:
    """A loss and what it needs; the function's keyword arguments are the options its YAML may set."""

    function: Callable
    needs_pairs: bool = True  # chosen and rejected responses, scored against a reference; else the SFT target alone

    @property
    def options(self) -> list[str]:
        """Names of the options that a config may set, besides `name` and `average_log_prob`."""
        parameters = inspect.signature(self.function).parameters.values()
        keywords = self.function.keywords if isinstance(self.function, functools.partial) else {}
        return [p.name for p in parameters if not p.name.endswith("_logps") and p.name not in keywords]


LOSSES = {
    "sft": Loss(sft_loss, needs_pairs=False),
    "dpo": Loss(functools.partial(preference_loss, ipo=False)),
    "ipo": Loss(functools.partial(preference_loss, ipo=True, label_smoothing=0.0)),
}


def needs_reference(loss_config) -> bool:
    """Whether this loss compares the policy with a reference model."""
    return LOSSES[loss_config.name].needs_pairs and not loss_config.reference_free


def _get_batch_logps(logits: torch.Tensor, labels: torch.Tensor, average_log_prob: bool = False) -> torch.Tensor:
    """Log-probability of each sequence's labels: Σ_t log π(label_t | what stands before it).

    Args:
        logits: unnormalized, shape (batch_size, sequence_length, vocab_size).
        labels: token ids, shape (batch_size, sequence_length); positions labelled -100 are left out.
        average_log_prob: divide by the number of labelled tokens.

    Returns: shape (batch_size,), in nats.
    """
    assert logits.shape[:-1] == labels.shape
    labels = labels[:, 1:]
    loss_mask = labels != -100
    per_token_logps = torch.gather(
        logits[:, :-1].log_softmax(-1), dim=2, index=labels.masked_fill(~loss_mask, 0).unsqueeze(2)
    ).squeeze(2)  # (B, T-1)
    logps = (per_token_logps * loss_mask).sum(-1)
    return logps / loss_mask.sum(-1) if average_log_prob else logps
