"""Preference and SFT losses: pure tensor maths on log-probabilities, in nats.

A new loss is one function here, one entry in `LOSSES` and one file in `config/loss`. The function's signature says what
it needs: see `Loss`.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Range:
    """The range of an option, given in its annotation: `gamma: Annotated[float, Range(above=0)]`."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None

    def violation(self, value: float) -> str | None:
        """Return the rule that a number breaks; None if it is in the range."""
        if self.above is not None and not value > self.above:
            return f"must be a number above {self.above}"
        if self.at_least is not None and not value >= self.at_least:
            return f"must be a number {self.at_least} or more"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below}"
        return None


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
FlipProbability = Annotated[float, Range(at_least=0, below=0.5)]  # that a preference label is wrong
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # losses, chosen and rejected rewards: (batch_size,) each


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


# ---- other losses of pairs that compare with a reference ------------------------------------------------------------
# h is the log-ratio of the chosen response less that of the rejected; a reward is β times a log-ratio, as DPO's.


def robust_dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
    label_smoothing: FlipProbability = 0.1,
) -> Outputs:
    """Robust DPO (https://arxiv.org/abs/2403.00409): unbiased where labels are flipped with probability ε.

    ((1 - ε) ℓ(h) - ε ℓ(-h)) / (1 - 2ε), with ℓ(h) = -log σ(βh). It has no lower bound.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = -F.logsigmoid(margins) * (1 - label_smoothing) + F.logsigmoid(-margins) * label_smoothing
    return losses / (1 - 2 * label_smoothing), chosen_rewards.detach(), rejected_rewards.detach()


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

    With `reference_free` and β = 1 it is the calibration term of Eq. 1 there; beside a reference, that of
    https://arxiv.org/abs/2309.06657.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = F.relu(delta - (chosen_rewards - rejected_rewards))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def dpop_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.3,
    penalty: NonNegative = 50.0,
) -> Outputs:
    """DPO-Positive (https://arxiv.org/abs/2402.13228): a chosen response may not become less likely than it was.

    -log σ(β (h - λ max(0, log π_ref(chosen) - log π(chosen)))), λ being `penalty`.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    losses = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - penalty * F.relu(-chosen_logratios)))
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def dpo_nll_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    beta: Positive = 0.1,
    nll_weight: NonNegative = 1.0,
) -> Outputs:
    """DPO with the negative log-likelihood of the chosen response, as in iterative RPO (arXiv 2404.19733).

    -log σ(βh) - α log π(chosen) / |chosen|, α being `nll_weight`; lengths are those of the response alone.
    """
    losses, chosen_rewards, rejected_rewards = preference_loss(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    return losses - nll_weight * policy_chosen_logps / chosen_lengths, chosen_rewards, rejected_rewards


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
    """Length-regularised DPO, R-DPO (https://arxiv.org/abs/2403.19159): a token costs α (`length_penalty`) of reward.

    -log σ(βh + α (|chosen| - |rejected|)): the part of a preference that length explains is not learnt.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    longer = (chosen_lengths - rejected_lengths).to(chosen_rewards.dtype)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards + length_penalty * longer)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def exo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, Range(above=0, below=0.5)] = 0.001,
) -> Outputs:
    """EXO on preferences (https://arxiv.org/abs/2402.00856): the reverse KL from the labels, (1 - ε, ε), to the policy.

    Eq. 16 with two responses: with p = σ(βh), p log(p / (1 - ε)) + (1 - p) log((1 - p) / ε).
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = margins.sigmoid() * (F.logsigmoid(margins) - math.log(1 - label_smoothing))
    losses = losses + (-margins).sigmoid() * (F.logsigmoid(-margins) - math.log(label_smoothing))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def chi_po_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: Positive = 0.1,
    max_reward: Positive = 10.0,
) -> Outputs:
    """χPO (https://arxiv.org/abs/2407.13399): DPO with the link φ(z) = z + log z, of z = π / π_ref, in place of log z.

    Algorithm 1: -log σ(clip(β φ(z chosen) - β φ(z rejected), ±2 R)), R being `max_reward`, for which the paper has no
    default. A ratio above e²⁰ counts as that, so that no exponential overflows. The rewards are β φ(z).
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    chosen_rewards = beta * (chosen_logratios.clamp(max=20).exp() + chosen_logratios)
    rejected_rewards = beta * (rejected_logratios.clamp(max=20).exp() + rejected_logratios)
    losses = -F.logsigmoid((chosen_rewards - rejected_rewards).clamp(-2 * max_reward, 2 * max_reward))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


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

    Eq. 8: λ_D (1 - σ(β (r - z₀))) for a desirable, λ_U (1 - σ(β (z₀ - r))) for an undesirable response, where r is the
    log-ratio of policy and reference and z₀, `kl_estimate`, the batch's estimate of their KL divergence (nats, 0 or
    more, without gradient). A pair's loss is the mean of its two.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    desirable = desirable_weight * (1 - torch.sigmoid(beta * (chosen_logratios - kl_estimate)))
    undesirable = undesirable_weight * (1 - torch.sigmoid(beta * (kl_estimate - rejected_logratios)))
    return (desirable + undesirable) / 2, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


# ---- losses of pairs without a reference ----------------------------------------------------------------------------


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
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def orpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: NonNegative = 0.1,
) -> Outputs:
    """ORPO (https://arxiv.org/abs/2403.07691): SFT on the chosen response and, weighed by λ (`beta`), the odds ratio.

    Eq. 6 and 7: -log P(chosen) - λ log σ(log odds(chosen) - log odds(rejected)), where log P is the mean
    log-probability of a token and odds = P / (1 - P). The rewards are λ log odds.
    """
    chosen_logps, rejected_logps = policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths
    chosen_odds, rejected_odds = (logps - _log_one_minus_exp(logps) for logps in (chosen_logps, rejected_logps))
    losses = -chosen_logps - beta * F.logsigmoid(chosen_odds - rejected_odds)
    return losses, beta * chosen_odds.detach(), beta * rejected_odds.detach()


def _log_one_minus_exp(logps: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) of x < 0 without loss of digits; x is taken to be at most -1e-7, where odds would be infinite."""
    logps = logps.clamp(max=-1e-7)
    # each branch is computed where it is taken, and at a harmless value elsewhere, or gradients would not be finite
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
    """CPO (https://arxiv.org/abs/2401.08417): DPO under a uniform reference, and SFT on the chosen response.

    -log σ(β log π(chosen) - β log π(rejected)) - log π(chosen); `nll_weight` (1) weighs the second term.
    """
    chosen_rewards, rejected_rewards = beta * policy_chosen_logps, beta * policy_rejected_logps
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards) - nll_weight * policy_chosen_logps
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# ---- what a loss declares -------------------------------------------------------------------------------------------

LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
LENGTHS = ("chosen_lengths", "rejected_lengths")
KL_ESTIMATE = "kl_estimate"


@dataclass(frozen=True)
class Option:
    """A setting of a loss that the config's `loss` section may hold."""

    type: type
    default: object = inspect.Parameter.empty  # this: the config must say it
    range: Range | None = None

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty


class Loss:
    """A loss function, and the inputs and options that its signature declares.

    Its parameters are, by their names,

    - inputs, tensors of shape (batch_size,): `policy_chosen_logps`, `policy_rejected_logps`, `reference_chosen_logps`,
      `reference_rejected_logps` (log-probabilities of whole responses, in nats) and `chosen_lengths`,
      `rejected_lengths` (predicted tokens in the responses); and `kl_estimate`, of shape (): the policy's KL divergence
      from the reference (nats, at least 0), estimated from the whole batch. A name with `rejected` makes it a loss of
      pairs; otherwise it trains on SFT targets. A name with `reference` makes it need a reference;
    - options, all others: `loss.NAME` in the config, with the type, range (`Range`) and default of the annotation. With
      an option `reference_free` set to true, no reference is loaded and its log-probabilities are zeros.

    A loss that takes no lengths gets one more option, `average_log_prob`: log-probabilities are then means per token.

    It returns the losses, or a tuple of losses, chosen rewards and rejected rewards; each of shape (batch_size,).

    Raises: TypeError if the signature declares something else.
    """

    def __init__(self, function: Callable):
        self.function = function
        # arguments that functools.partial has set are no options
        given = function.keywords if isinstance(function, functools.partial) else {}
        hints = typing.get_type_hints(getattr(function, "func", function), include_extras=True)
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in given]
        known = (*LOGPS, *LENGTHS, KL_ESTIMATE)
        self.inputs = tuple(p.name for p in parameters if p.name.endswith("_logps") or p.name in known)
        unknown = set(self.inputs) - set(known)
        if unknown or not self.inputs:
            raise TypeError(f"{function}: unknown inputs {sorted(unknown)}, or none; there are {', '.join(known)}")
        self.options = {p.name: _option(p, hints.get(p.name)) for p in parameters if p.name not in self.inputs}
        self.takes_kl_estimate = KL_ESTIMATE in self.inputs
        self.takes_lengths = any(name in LENGTHS for name in self.inputs)
        if not self.takes_lengths and not self.takes_kl_estimate:
            self.options["average_log_prob"] = Option(bool, False)
        self.needs_pairs = any("rejected" in name for name in self.inputs)
        self._compares = any(name.startswith("reference_") for name in self.inputs)
        if self._compares and not self.needs_pairs:
            raise TypeError(f"{function}: references are of pairs; take policy_rejected_logps, too")

    def needs_reference(self, loss_config) -> bool:
        """True if the loss compares the policy with a reference under these options."""
        return self._compares and not loss_config.get("reference_free", False)

    def __call__(self, inputs: dict[str, torch.Tensor], loss_config) -> tuple[torch.Tensor, ...]:
        """Return the losses of a batch, and rewards if there are any; `inputs` hold at least those that it declares."""
        arguments = {name: inputs[name] for name in self.inputs}
        options = {
            name: loss_config[name] for name in self.options if name in loss_config and name != "average_log_prob"
        }
        output = self.function(**arguments, **options)
        return output if isinstance(output, tuple) else (output,)


def _option(parameter: inspect.Parameter, hint: object) -> Option:
    """Read an option's type, range and default from a parameter."""
    value_range = None
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        value_range = next((note for note in notes if isinstance(note, Range)), None)
    if hint not in (float, int, bool, str):
        raise TypeError(f"option {parameter.name} of a loss: annotate it with float, int, bool or str, not {hint}")
    return Option(hint, parameter.default, value_range)


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
