"""Losses of preference pairs that compare the policy with a reference.

In the formulas, r is a response's log-ratio, log π(y|x) - log π_ref(y|x), and h = r(chosen) - r(rejected). Rewards are
β r, as in DPO, unless a loss says otherwise.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F

from objectives.declaration import Outputs
from objectives.options import FlipProbability, NonNegative, Positive, Range


def robust_dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
    label_smoothing: FlipProbability = 0.1,
) -> Outputs:
    """Robust DPO (https://arxiv.org/abs/2403.00409): unbiased if labels are flipped with probability ε.

    ((1 - ε) ℓ(h) - ε ℓ(-h)) / (1 - 2ε), where ℓ(h) = -log σ(βh) and ε is `label_smoothing`. It has no lower bound.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = -F.logsigmoid(margins) * (1 - label_smoothing) + F.logsigmoid(-margins) * label_smoothing
    return losses / (1 - 2 * label_smoothing), chosen_rewards, rejected_rewards


def hinge_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
    delta: Positive = 1.0,
    reference_free: bool = False,
) -> Outputs:
    """The hinge of SLiC (https://arxiv.org/abs/2305.10425): max(0, δ - βh).

    With `reference_free` and β = 1 it is the calibration term of Eq. 1 there; with a reference, the hinge loss of RSO
    (https://arxiv.org/abs/2309.06657).
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = F.relu(delta - (chosen_rewards - rejected_rewards))
    return losses, chosen_rewards, rejected_rewards


def dpop_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.3,
    penalty: NonNegative = 50.0,
) -> Outputs:
    """DPO-Positive (https://arxiv.org/abs/2402.13228): penalizes a chosen response that becomes less likely.

    -log σ(β (h - λ max(0, -r(chosen)))), where λ is `penalty`.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    losses = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - penalty * F.relu(-chosen_logratios)))
    return losses, beta * chosen_logratios, beta * rejected_logratios


def dpo_nll_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    beta: Positive = 0.1,
    nll_weight: NonNegative = 1.0,
) -> Outputs:
    """DPO plus the negative log-likelihood of the chosen response, as in iterative RPO (arXiv 2404.19733).

    -log σ(βh) - α log π(chosen) / |chosen|, where α is `nll_weight` and |chosen| counts the tokens of the response.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards) - nll_weight * policy_chosen_logps / chosen_lengths
    return losses, chosen_rewards, rejected_rewards


def length_dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: Positive = 0.1,
    length_penalty: NonNegative = 0.01,
) -> Outputs:
    """Length-regularized DPO, R-DPO (https://arxiv.org/abs/2403.19159): each token costs a reward of α.

    -log σ(βh + α (|chosen| - |rejected|)), where α is `length_penalty`. The policy then doesn't learn the part of a
    preference that length explains.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    longer = (chosen_lengths - rejected_lengths).to(chosen_rewards.dtype)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards + length_penalty * longer)
    return losses, chosen_rewards, rejected_rewards


def exo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, Range(above=0, below=0.5)] = 0.001,
) -> Outputs:
    """EXO on preferences (https://arxiv.org/abs/2402.00856): KL(policy ‖ labels), the labels being (1 - ε, ε).

    Eq. 16 for two responses: p log(p / (1 - ε)) + (1 - p) log((1 - p) / ε), where p = σ(βh).
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = margins.sigmoid() * (F.logsigmoid(margins) - math.log(1 - label_smoothing))
    losses = losses + (-margins).sigmoid() * (F.logsigmoid(-margins) - math.log(label_smoothing))
    return losses, chosen_rewards, rejected_rewards


def chi_po_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
    max_reward: Positive = 10.0,
) -> Outputs:
    """χPO (https://arxiv.org/abs/2407.13399): DPO with φ(z) = z + log z in place of log z, where z = π / π_ref.

    Algorithm 1: -log σ(clip(β φ(z chosen) - β φ(z rejected), ±2 R)), where R is `max_reward`; the paper gives no
    default. In the term z, ratios are capped at e²⁰, so that no exponential overflows. Rewards are β φ(z).
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    chosen_rewards = beta * (chosen_logratios.clamp(max=20).exp() + chosen_logratios)
    rejected_rewards = beta * (rejected_logratios.clamp(max=20).exp() + rejected_logratios)
    losses = -F.logsigmoid((chosen_rewards - rejected_rewards).clamp(-2 * max_reward, 2 * max_reward))
    return losses, chosen_rewards, rejected_rewards


def kto_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    kl_estimate: torch.Tensor,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Outputs:
    """KTO (https://arxiv.org/abs/2402.01306): chosen responses are desirable, rejected ones undesirable.

    Eq. 8: λ_D (1 - σ(β (r - z₀))) for a desirable response, λ_U (1 - σ(β (z₀ - r))) for an undesirable one. z₀ is
    `kl_estimate`, the batch's estimate of the KL divergence of policy and reference (nats, at least 0, without
    gradient). A pair's loss is the mean over its two responses.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    desirable = desirable_weight * (1 - torch.sigmoid(beta * (chosen_logratios - kl_estimate)))
    undesirable = undesirable_weight * (1 - torch.sigmoid(beta * (kl_estimate - rejected_logratios)))
    return (desirable + undesirable) / 2, beta * chosen_logratios, beta * rejected_logratios


def apo_zero_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
) -> Outputs:
    """APO-zero (https://arxiv.org/abs/2408.06266): chosen responses become likelier, rejected ones less likely.

    Eq. 7: 1 - σ(β r(chosen)) + σ(β r(rejected)).
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = torch.sigmoid(-chosen_rewards) + torch.sigmoid(rejected_rewards)
    return losses, chosen_rewards, rejected_rewards


def apo_down_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
) -> Outputs:
    """APO-down (https://arxiv.org/abs/2408.06266): both responses become less likely, the rejected one more so.

    Eq. 8: σ(β r(chosen)) + 1 - σ(βh). For data whose chosen responses are worse than the model's own.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = torch.sigmoid(chosen_rewards) + torch.sigmoid(rejected_rewards - chosen_rewards)
    return losses, chosen_rewards, rejected_rewards


def nca_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
) -> Outputs:
    """NCA on pairs (https://arxiv.org/abs/2402.05369): keeps the chosen response's likelihood from falling.

    -log σ(β r(chosen)) - ½ log σ(-β r(chosen)) - ½ log σ(-β r(rejected)).
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards) - (F.logsigmoid(-chosen_rewards) + F.logsigmoid(-rejected_rewards)) / 2
    return losses, chosen_rewards, rejected_rewards


def sppo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
) -> Outputs:
    """SPPO with hard labels (https://arxiv.org/abs/2405.00675): regresses log-ratios to 1/(2β) and -1/(2β).

    (r(chosen) - 1/(2β))² + (r(rejected) + 1/(2β))²: Eq. 4.7 with η = 1/β, if the chosen response wins with
    probability 1.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    losses = (chosen_logratios - 1 / (2 * beta)) ** 2 + (rejected_logratios + 1 / (2 * beta)) ** 2
    return losses, beta * chosen_logratios, beta * rejected_logratios


def discopop_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.05,
    tau: Annotated[float, Range(above=0, below=1)] = 0.05,
) -> Outputs:
    """DiscoPOP (https://arxiv.org/abs/2406.08414): the log-ratio modulated loss, which a language model proposed.

    Eq. 5: (1 - σ(βh/τ)) (-log σ(βh)) + σ(βh/τ) e^-βh.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    exponential = (F.logsigmoid(margins / tau) - margins).exp()  # σ(βh/τ) e^-βh as one exponential can't overflow
    losses = torch.sigmoid(-margins / tau) * -F.logsigmoid(margins) + exponential
    return losses, chosen_rewards, rejected_rewards


def dpo_norm_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: Positive = 5.0,
) -> Outputs:
    """Length-normalized DPO, as in Tülu 3 (https://arxiv.org/abs/2411.15124): log-ratios are means over tokens.

    -log σ(β r(chosen) / |chosen| - β r(rejected) / |rejected|). The same as `dpo` with `average_log_prob` and larger β.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps) / chosen_lengths
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps) / rejected_lengths
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards, rejected_rewards
