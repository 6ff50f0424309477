"""Means of what training and evaluation measure, and what is said where they aren't finite."""

import math
from collections import defaultdict

import torch
from omegaconf import DictConfig

from distributed import collectives
from utils import UserError


def mean_metrics(batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Mean over the examples of several batches, all workers', for each metric; the one place where metrics leave the
    device."""
    collected = defaultdict(list)
    for metrics in batches:
        for key, values in metrics.items():
            collected[key].append(values)
    values = [torch.cat(values) for values in collected.values()]
    values = [v.to(torch.float32 if v.is_mps else torch.float64) for v in values]  # Apple's GPUs have no float64
    sums_and_counts = torch.stack([torch.stack([v.sum(), v.new_tensor(len(v))]) for v in values])  # (metrics, 2)
    sums, counts = collectives.all_reduce_sum(sums_and_counts).unbind(1)
    return dict(zip(collected, (sums / counts).tolist(), strict=True))


def check_finite(where: str, prompts: list[str], config: DictConfig, **numbers: float):
    """Raises UserError with step or evaluation, the batch's prompts and what to try, if a number isn't finite."""
    if all(math.isfinite(number) for number in numbers.values()):
        return
    values = ", ".join(f"{name} {number}" for name, number in numbers.items())
    all_prompts = [prompt for of_rank in collectives.all_gather_object(prompts) for prompt in of_rank]
    shown = "\n".join(f"  {prompt[-200:]!r}" for prompt in dict.fromkeys(all_prompts))
    others = {key: config[key] for key in ("optimizer_args", "lora") if config[key]}
    others |= {f"loss.{name}": value for name, value in config.loss.items() if isinstance(value, float)}
    also = "".join(f"another {key} (now {value}), " for key, value in others.items())
    raise UserError(
        f"{where}: {values}; training can't go on. "
        f"The prompts of the batch end with:\n{shown}\n"
        f"Try a smaller lr (now {config.lr}) or max_grad_norm (now {config.max_grad_norm}), more "
        f"warmup_steps (now {config.warmup_steps}), {also}or model.policy_dtype=float32 (now "
        f"{config.model.policy_dtype}); checkpoints written so far are in {config.local_run_dir}"
    )
