"""Modifiers: options that change the inputs of a loss, or weight its pairs. All are off by default.

They are applied in this order:

- `ld_alpha`, LD-DPO (https://arxiv.org/abs/2409.06411): tokens beyond the shorter response's length weigh α;
- `average_log_prob`: log-probabilities are means over a response's tokens;
- `f_divergence`, f-DPO (https://arxiv.org/abs/2309.16240): regularizes by another divergence than the reverse KL;
- `wpo`, WPO (https://arxiv.org/abs/2406.11827): multiplies the losses (`Loss.compute`), so that pairs which the policy
  itself would hardly generate count less.
"""

import math

import torch
import torch.nn.functional as F

from objectives.options import OneOf, Option, Range

MEAN = {"average_log_prob": Option(bool, False)}
LENGTH_DESENSITIZED = {"ld_alpha": Option(float, 1.0, Range(at_least=0, at_most=1))}
F_DIVERGENCE = {
    "f_divergence": Option(str, "reverse_kl", OneOf("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")),
    "f_alpha": Option(float, 0.5, Range(above=0, below=1)),
}
WEIGHTED = {"wpo": Option(bool, False)}
UNLISTED = {**LENGTH_DESENSITIZED, **WEIGHTED, **F_DIVERGENCE}  # options that the losses' YAML files don't repeat
_MAX_EXPONENT = 80  # larger ones overflow in float32


def options(needs_pairs: bool, takes_whole_batch: bool, margin_only: bool) -> dict[str, Option]:
    """Return the modifiers that fit a loss whose only inputs are log-probabilities.

    Args:
        needs_pairs: the loss compares two responses.
        takes_whole_batch: the loss needs the whole batch, so its pairs can't be weighted one by one.
        margin_only: the loss depends only on the difference of the two log-ratios.
    """
    weighted = WEIGHTED if needs_pairs and not takes_whole_batch else {}
    return MEAN | (LENGTH_DESENSITIZED if needs_pairs else {}) | weighted | (F_DIVERGENCE if margin_only else {})


def modified(inputs: dict, loss_config) -> dict:
    """Return the inputs of a loss, changed by its modifiers."""
    inputs = dict(inputs)
    names = [name for name in inputs if name.endswith("_logps") and not name.endswith("_shared_logps")]
    for name in names:
        if loss_config.get("ld_alpha", 1.0) != 1.0:
            # with `reference_free`, there are no shared log-probabilities of the reference; this keeps its zeros
            shared = inputs.get(name.replace("_logps", "_shared_logps"), inputs[name])
            inputs[name] = shared + loss_config["ld_alpha"] * (inputs[name] - shared)
        if loss_config.get("average_log_prob", False):
            inputs[name] = inputs[name] / inputs[f"{_side(name)}_lengths"]
    divergence = loss_config.get("f_divergence", "reverse_kl")
    if divergence != "reverse_kl":
        for name in [name for name in names if name.startswith("policy_")]:
            reference = inputs[name.replace("policy", "reference")]
            score = derivative(divergence, inputs[name] - reference, loss_config.get("f_alpha", 0.5))
            inputs[name] = reference + score
    return inputs


def _side(name: str) -> str:
    return name.split("_")[1]


def derivative(divergence: str, logratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return f'(u) of a divergence at u = π / π_ref, given log u; f-DPO puts it in place of log u.

    Up to a constant, which cancels in the difference of two responses, it is log u for the reverse KL, 1 - 1/u for the
    forward KL, log(2u / (1 + u)) for Jensen-Shannon, and (1 - u^-α) / α for the α-divergence.
    """
    if divergence == "forward_kl":
        return -torch.expm1((-logratios).clamp(max=_MAX_EXPONENT))
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "alpha_divergence":
        return -torch.expm1((-alpha * logratios).clamp(max=_MAX_EXPONENT)) / alpha
    return logratios
