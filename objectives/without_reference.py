"""Losses of preference pairs that need no reference."""

import math

import torch
import torch.nn.functional as F

from objectives.declaration import Outputs
from objectives.options import NonNegative, Positive


def simpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: Positive = 2.0,
    gamma: NonNegative = 1.0,
) -> Outputs:
    """SimPO (https://arxiv.org/abs/2405.14734): a reward is β times the mean log-probability of a token.

    Eq. 6: -log σ(β log π(chosen) / |chosen| - β log π(rejected) / |rejected| - γ).
    """
    chosen_rewards = beta * policy_chosen_logps / chosen_lengths
    rejected_rewards = beta * policy_rejected_logps / rejected_lengths
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma)
    return losses, chosen_rewards, rejected_rewards


def orpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: NonNegative = 0.1,
) -> Outputs:
    """ORPO (https://arxiv.org/abs/2403.07691): SFT on the chosen response, plus a loss of the odds ratio.

    Eq. 6 and 7: -log P(chosen) - λ log σ(log odds(chosen) - log odds(rejected)), where λ is `beta`, log P the
    mean log-probability of a token, and odds = P / (1 - P). Rewards are λ log odds.
    """
    chosen_logps, rejected_logps = policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths
    chosen_odds, rejected_odds = (logps - _log_one_minus_exp(logps) for logps in (chosen_logps, rejected_logps))
    losses = -chosen_logps - beta * F.logsigmoid(chosen_odds - rejected_odds)
    return losses, beta * chosen_odds, beta * rejected_odds


def _log_one_minus_exp(logps: torch.Tensor) -> torch.Tensor:
    """Return log(1 - e^x) for x < 0 without loss of digits; x is clamped to -1e-7, because odds are infinite at 0."""
    logps = logps.clamp(max=-1e-7)
    # `where` also computes the branch not taken; a harmless input there keeps its gradient finite
    is_near_zero = logps > -math.log(2)
    near = torch.where(is_near_zero, logps, -1.0)
    far = torch.where(is_near_zero, -1.0, logps)
    return torch.where(is_near_zero, (-near.expm1()).log(), (-far.exp()).log1p())


def cpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
    nll_weight: NonNegative = 1.0,
) -> Outputs:
    """CPO (https://arxiv.org/abs/2401.08417): DPO with a uniform reference, plus SFT on the chosen response.

    -log σ(β log π(chosen) - β log π(rejected)) - log π(chosen); `nll_weight` (1) multiplies the second term.
    """
    chosen_rewards, rejected_rewards = beta * policy_chosen_logps, beta * policy_rejected_logps
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards) - nll_weight * policy_chosen_logps
    return losses, chosen_rewards, rejected_rewards
