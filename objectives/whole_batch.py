"""Losses that need the whole batch: they sort it, average it, or update a moving average with it.

Their inputs hold the pairs of all microbatches and workers, so the result doesn't depend on how a batch is divided.
"""

import torch
import torch.nn.functional as F

from objectives.declaration import Memory, Outputs, WholeBatch
from objectives.options import Momentum, NonNegative, Positive


def sft_tokens_loss(policy_chosen_logps: torch.Tensor, mean_chosen_length: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood per token: a batch's loss is the mean over its tokens, so long responses count more."""
    return -policy_chosen_logps / mean_chosen_length


def aot_loss(
    policy_chosen_logps: WholeBatch,
    policy_rejected_logps: WholeBatch,
    reference_chosen_logps: WholeBatch,
    reference_rejected_logps: WholeBatch,
    beta: Positive = 0.1,
) -> Outputs:
    """AOT on pairs (https://arxiv.org/abs/2406.05882): the distribution of margins should dominate the reference's.

    -log σ(β (m₍ᵢ₎ - m_ref₍ᵢ₎)), where m₍ᵢ₎ is the batch's i-th smallest margin log π(chosen) - log π(rejected).
    """
    margins = policy_chosen_logps - policy_rejected_logps
    reference_margins = reference_chosen_logps - reference_rejected_logps
    losses = -F.logsigmoid(beta * (margins - _same_rank(margins, reference_margins)))
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    return losses, chosen_rewards, rejected_rewards


def aot_unpaired_loss(
    policy_chosen_logps: WholeBatch,
    policy_rejected_logps: WholeBatch,
    reference_chosen_logps: WholeBatch,
    reference_rejected_logps: WholeBatch,
    beta: Positive = 0.1,
) -> Outputs:
    """AOT on single responses (https://arxiv.org/abs/2406.05882): chosen log-ratios should dominate rejected ones.

    -log σ(β (r(chosen)₍ᵢ₎ - r(rejected)₍ᵢ₎)), where r(chosen)₍ᵢ₎ is the i-th smallest log-ratio of chosen responses.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - _same_rank(chosen_rewards, rejected_rewards))
    return losses, chosen_rewards, rejected_rewards


def _same_rank(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return, for each value, the entry of `others` that has the same rank."""
    return others.sort().values[values.argsort().argsort()]


def bco_loss(
    policy_chosen_logps: WholeBatch,
    policy_rejected_logps: WholeBatch,
    reference_chosen_logps: WholeBatch,
    reference_rejected_logps: WholeBatch,
    memory: Memory,
    beta: Positive = 0.1,
    momentum: Momentum = 0.9,
) -> Outputs:
    """BCO (https://arxiv.org/abs/2404.04656): the reward is the logit of a classifier of good and bad responses.

    -log σ(R(chosen) - δ) - log σ(δ - R(rejected)), where R is the reward, β times a log-ratio. The reward shift δ is a
    moving average, over batches, of the mean reward of all responses.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    shift = memory.moving_average("bco_shift", (chosen_rewards.mean() + rejected_rewards.mean()) / 2, momentum)
    losses = -F.logsigmoid(chosen_rewards - shift) - F.logsigmoid(shift - rejected_rewards)
    return losses, chosen_rewards, rejected_rewards


def beta_dpo_loss(
    policy_chosen_logps: WholeBatch,
    policy_rejected_logps: WholeBatch,
    reference_chosen_logps: WholeBatch,
    reference_rejected_logps: WholeBatch,
    memory: Memory,
    beta: Positive = 0.1,
    sensitivity: NonNegative = 0.6,
    momentum: Momentum = 0.9,
) -> Outputs:
    """β-DPO (https://arxiv.org/abs/2407.08639): batches with a larger margin than usual get a larger β.

    -log σ(β h), where β = (1 + α (M - M₀)) β₀, at least β₀ / 100. M is the batch's mean reward margin β₀ h, M₀ the
    moving average of M, α the option `sensitivity`, β₀ the option `beta`. The paper's filter of outliers is left out.
    """
    logratios = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    margins = logratios[0] - logratios[1]
    mean_margin = beta * margins.mean().detach()
    usual_margin = memory.moving_average("beta_dpo_margin", mean_margin, momentum)
    batch_beta = beta * (1 + sensitivity * (mean_margin - usual_margin)).clamp(min=0.01)
    chosen_rewards, rejected_rewards = (batch_beta * of_side for of_side in logratios)
    return -F.logsigmoid(batch_beta * margins), chosen_rewards, rejected_rewards
