"""Compute metrics of training and evaluation and their means; stop the run if they aren't finite."""

import math
from collections import defaultdict

import torch
from omegaconf import DictConfig

from distributed import collectives
from reporting.metric_names import WITH_ERRORS
from utils import UserError, widest_dtype

TIE = 1e-5  # smaller differences of rewards are rounding noise: ties


def mean_metrics(batches: list[dict[str, torch.Tensor]], n_examples: int | None = None) -> dict[str, float]:
    """Return the mean of each metric over the examples of several batches, on all workers.

    Metrics stay on the device until this function is called.

    Args:
        n_examples: the number of examples on all workers; from 2 on, the metrics in `WITH_ERRORS` get a standard error,
            NAME_se.
    """
    collected = defaultdict(list)
    for metrics in batches:
        for key, values in metrics.items():
            collected[key].append(values)
    values = [torch.cat(values) for values in collected.values()]
    values = [v.to(widest_dtype(v.device)) for v in values]
    moments = [torch.stack([v.sum(), v.new_tensor(len(v)), v.square().sum()]) for v in values]
    sums, counts, squares = collectives.all_reduce_sum(torch.stack(moments)).unbind(1)  # (metrics,) each
    means = sums / counts
    errors = ((squares / counts - means.square()).clamp(min=0) / max((n_examples or 1) - 1, 1)).sqrt()
    names, (means, errors) = list(collected), torch.stack([means, errors]).tolist()
    metrics = dict(zip(names, means, strict=True))
    if n_examples is not None and n_examples > 1:
        metrics |= {f"{name}_se": e for name, e in zip(names, errors, strict=True) if name in WITH_ERRORS}
    return metrics


def reward_metrics(split: str, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the original's metrics of rewards (nats), and a metric for ties: tensors of shape (batch_size,)."""
    margins = chosen_rewards - rejected_rewards
    return {
        f"rewards_{split}/chosen": chosen_rewards,
        f"rewards_{split}/rejected": rejected_rewards,
        f"rewards_{split}/accuracies": (chosen_rewards > rejected_rewards).float(),
        f"rewards_{split}/margins": margins,
        f"rewards_{split}/ties": (margins.abs() < TIE).float(),
    }


def response_metrics(split: str, inputs: dict[str, torch.Tensor], has_reference: bool) -> dict[str, torch.Tensor]:
    """Return metrics that can be compared across losses and settings: tensors of shape (batch_size,).

    `nll_*`: negative log-likelihood of a response per token. `lengths_*`: tokens in a response. `logratios_*`:
    log-probability of the whole response under the policy minus that under the reference (nats).

    Args:
        inputs: the loss's inputs: log-probabilities, summed over each response, and lengths.
        has_reference: the inputs include the reference's log-probabilities.
    """
    metrics = {}
    for side in ("chosen", "rejected"):
        if f"policy_{side}_logps" not in inputs:
            continue
        logps, lengths = inputs[f"policy_{side}_logps"].detach(), inputs[f"{side}_lengths"]
        metrics[f"nll_{split}/{side}"] = -logps / lengths.clamp(min=1)
        if has_reference:
            metrics[f"logratios_{split}/{side}"] = logps - inputs[f"reference_{side}_logps"].detach()
        metrics[f"lengths_{split}/{side}"] = lengths
    return metrics


def kl_metrics(samples: list[tuple[float, int]]) -> dict[str, float]:
    """Estimate the policy's KL divergence from the reference (nats) on samples of the policy.

    Args:
        samples: (log-ratio of policy to reference, length in tokens) of each sample.
    """
    if not samples:
        return {}
    logratios, lengths = zip(*samples, strict=True)
    n, mean = len(logratios), sum(logratios) / len(logratios)
    variance = sum((logratio - mean) ** 2 for logratio in logratios) / max(n - 1, 1)
    error = {"kl_eval/per_response_se": math.sqrt(variance / n)} if n > 1 else {}
    per_token = sum(logratios) / max(sum(lengths), 1)
    return {"kl_eval/per_response": mean, **error, "kl_eval/per_token": per_token}


def check_finite(where: str, prompts: list[str], config: DictConfig, metrics: dict[str, float], **numbers: float):
    """Raise UserError if one of the numbers isn't finite.

    Args:
        where: the step or evaluation, for the message.
        prompts: those of its batch.
        metrics: the batch's means, which show whether the reference overflows.
    """
    if all(math.isfinite(number) for number in numbers.values()):
        return
    values = ", ".join(f"{name} {number}" for name, number in numbers.items())
    all_prompts = [prompt for of_rank in collectives.all_gather_object(prompts) for prompt in of_rank]
    shown = "\n".join(f"  {prompt[-200:]!r}" for prompt in dict.fromkeys(all_prompts))
    others = {key: config[key] for key in ("optimizer_args", "lora") if config[key]}
    others |= {f"loss.{name}": value for name, value in config.loss.items() if isinstance(value, float)}
    also = "".join(f"another {key} (now {value}), " for key, value in others.items())
    if config.model.reference_dtype is not None and _reference_overflows(metrics):
        raise UserError(
            f"{where}: {values}; the policy's log-probabilities are finite, the reference's are not: it overflows in "
            f"model.reference_dtype={config.model.reference_dtype}. Use model.reference_dtype=bfloat16 or float32. "
            f"The prompts of the batch end with:\n{shown}"
        )
    raise UserError(
        f"{where}: {values}; training can't continue. "
        f"The prompts of the batch end with:\n{shown}\n"
        f"Try a smaller lr (now {config.lr}) or max_grad_norm (now {config.max_grad_norm}), more "
        f"warmup_steps (now {config.warmup_steps}), {also}or model.policy_dtype=float32 (now "
        f"{config.model.policy_dtype}); checkpoints written so far are in {config.local_run_dir}"
    )


def _reference_overflows(metrics: dict[str, float]) -> bool:
    """True if log-ratios are not finite while the policy's log-probabilities are."""
    logratios = [value for name, value in metrics.items() if name.startswith("logratios_")]
    logps = [value for name, value in metrics.items() if name.startswith("logps_")]
    return not all(map(math.isfinite, logratios)) and all(map(math.isfinite, logps))
