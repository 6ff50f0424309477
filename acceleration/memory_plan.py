"""Plan a GPU's memory at the start of a run: the bytes that it will hold, and the largest microbatch that then fits."""

from collections import Counter
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import nn

from acceleration.capacity import Activations, microbatch_bytes
from acceleration.optimizer_memory import state_bytes, step_one_by_one, uses_foreach_by_default
from acceleration.out_of_memory import remedies
from distributed import collectives
from distributed.dtensor import n_gathered
from utils import UserError, rank0_print, transformer_blocks, unwrap_adapter

_SHARE_FOR_ACTIVATIONS = 0.9  # of free memory; the rest is for fragmentation and kernel workspaces


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that a run will hold on one GPU, and the largest microbatch that fits into the rest."""

    device: torch.device
    held: dict[str, int]  # bytes by kind, from the first step on
    total: int  # bytes of the GPU's memory
    bytes_per_token: float  # at the peak of a microbatch
    max_tokens: int  # in a microbatch; 0: the held bytes alone don't fit
    foreach_fits: bool  # there is room for an optimizer step over all weights at once, which copies the gradients

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gb(n_bytes)}" for name, n_bytes in self.held.items() if n_bytes)
        return (
            f"Memory of {self.device} (GB): {parts}; {_gb(sum(self.held.values()))} of {_gb(self.total)} held, "
            f"activations {self.bytes_per_token / 1e6:.3g} MB per token: up to {self.max_tokens:,} tokens per "
            "microbatch"
        )


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f}" if n_bytes >= 5e7 else f"{n_bytes / 1e9:.1g}"


def plan_memory(
    config: DictConfig,
    policy: nn.Module,
    reference: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    activations: Activations,
    n_tokens: int,
    gathers_blocks: bool,
) -> int | None:
    """Print the memory plan of each GPU of rank 0. If memory is short, let the optimizer update one tensor at a time.

    `n_tokens`: tokens in an example of full length; for the other arguments see `memory_plans`.

    Returns: the largest number of tokens in a microbatch, the same on all workers; None without a GPU.
    Raises: UserError if the run doesn't fit.
    """
    dtype = getattr(torch, config.model.policy_mp) if config.model.policy_mp else policy.dtype
    plans = memory_plans(policy, reference, state_bytes(optimizer), activations, dtype, gathers_blocks)
    for plan in plans:
        rank0_print(plan)
    if warning := check_fits(plans, config, n_tokens):
        rank0_print(warning)
    if plans and uses_foreach_by_default(optimizer, plans[0].device) and not all(p.foreach_fits for p in plans):
        rank0_print("Optimizer: updating one weight tensor at a time, because memory is short")
        step_one_by_one(optimizer)
    max_tokens = max_tokens_that_fit(plans)
    return max_tokens and -collectives.all_reduce_max(-max_tokens)  # the minimum over all workers


def memory_plans(
    policy: nn.Module,
    reference: nn.Module | None,
    optimizer_bytes: dict[torch.device, int],
    activations: Activations,
    compute_dtype: torch.dtype,
    gathers_blocks: bool = False,
) -> list[MemoryPlan]:
    """Plan the memory of each GPU that the policy is computed on, before gradients and optimizer state are allocated.

    Args:
        reference: a second model in memory, if there is one.
        optimizer_bytes: see `optimizer_memory.state_bytes`.
        compute_dtype: the dtype of the policy's forward pass.
        gathers_blocks: weights are gathered for each block in turn (FSDP).
    """
    weights, gradients, of_reference = Counter(), Counter(), Counter()
    for parameter in policy.parameters():
        device, n_bytes = parameter.device, _local_bytes(parameter)
        weights[device] += n_bytes
        if parameter.requires_grad:
            gradients[device] += n_bytes
    for parameter in reference.parameters() if reference is not None else ():
        of_reference[parameter.device] += _local_bytes(parameter)
    plans = []
    for device in sorted(activations.kept.keys(), key=str):
        if device.type != "cuda":
            continue
        gathered = _gathered_bytes(policy, compute_dtype) if gathers_blocks else 0
        held = {
            "weights": weights[device],
            "gradients": gradients[device],
            "optimizer": optimizer_bytes.get(device, 0),
            "reference": of_reference[device],
            f"{str(compute_dtype)[6:]} copies": activations.casts.get(device, 0),
            "gathered weights": gathered,
        }
        free, total = free_and_total_bytes(device)
        # weights and reference are allocated already
        left = free - sum(held.values()) + held["weights"] + held["reference"]
        constant, per_token = microbatch_bytes(policy, activations, device)
        n_tokens = max(1, int(_SHARE_FOR_ACTIVATIONS * (left - constant) / per_token)) if left > 0 else 0
        copies = activations.casts.get(device, 0)  # freed before the step
        plans.append(MemoryPlan(device, held, total, per_token, n_tokens, left + copies >= gradients[device]))
    return plans


def free_and_total_bytes(device: torch.device) -> tuple[int, int]:
    """Return the bytes of a GPU that this process can still allocate, and all bytes of that GPU."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def _local_bytes(parameter: torch.Tensor) -> int:
    return getattr(parameter, "_local_tensor", parameter).nbytes


def _gathered_bytes(policy: nn.Module, compute_dtype: torch.dtype) -> int:
    """Return the bytes that FSDP gathers at once.

    They are the weights outside the blocks, the weights of two blocks, and the float32 gradients of one block or of all
    weights outside the blocks, whichever is larger.
    """

    def size(modules: nn.Module) -> int:
        return sum(n_gathered(parameter) for parameter in modules.parameters())

    base = unwrap_adapter(policy)
    blocks = [size(block) for block in transformer_blocks(base, None)]
    outside, largest = size(base) - sum(blocks), max(blocks, default=0)
    return (outside + 2 * largest) * compute_dtype.itemsize + 4 * max(outside, largest)


def check_fits(plans: list[MemoryPlan], config: DictConfig, n_tokens: int) -> str | None:
    """Return a warning if the run fits into memory, but not with an example of full length (`n_tokens`).

    Raises: UserError if the bytes that the run holds don't fit.
    """
    if not plans:
        return None
    fullest = min(plans, key=lambda plan: plan.max_tokens)
    if fullest.max_tokens == 0:
        raise UserError(f"this run doesn't fit. {_needs(fullest)}\n{remedies(config)}")
    if fullest.max_tokens < n_tokens:
        return (
            f"WARNING: an example of max_length={config.max_length} takes {n_tokens:,} tokens, and there is memory for "
            f"about {fullest.max_tokens:,}. {remedies(config)}"
        )
    return None


def _needs(plan: MemoryPlan) -> str:
    parts = ", ".join(f"{name} {_gb(n_bytes)}" for name, n_bytes in plan.held.items() if n_bytes)
    return f"{plan.device} has {_gb(plan.total)} GB and would hold {_gb(sum(plan.held.values()))} GB: {parts}"


def max_tokens_that_fit(plans: list[MemoryPlan]) -> int | None:
    """Return the largest number of tokens in a microbatch that fits on every GPU; None without a GPU."""
    return min((plan.max_tokens for plan in plans), default=None)
