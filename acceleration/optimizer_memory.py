"""Estimate the memory that an optimizer needs for its state and in a step."""

import inspect
from collections import Counter

import torch
from torch import nn


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[torch.device, int]:
    """Return the bytes that an optimizer will keep on each device as its state.

    They are measured by a step of the same kind of optimizer on a few weights: RMSprop keeps one number per weight,
    AdamW two.
    """
    n_bytes: Counter[torch.device] = Counter()
    per_weight: dict[torch.dtype, float] = {}
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter.dtype not in per_weight:
            per_weight[parameter.dtype] = _state_bytes_per_weight(optimizer, parameter.dtype)
        local = getattr(parameter, "_local_tensor", parameter)
        n_bytes[parameter.device] += int(per_weight[parameter.dtype] * local.numel())
    return dict(n_bytes)


def _state_bytes_per_weight(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> float:
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    settings |= dict.fromkeys({"fused", "foreach"} & settings.keys()) | dict.fromkeys(
        {"capturable"} & settings.keys(), False
    )
    probe = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    probe.grad = torch.ones_like(probe)
    probing = type(optimizer)([probe], **settings)
    probing.step()
    tensors = (value for value in probing.state[probe].values() if isinstance(value, torch.Tensor))
    return sum(value.nbytes for value in tensors if value.shape == probe.shape) / probe.numel()


def step_one_by_one(optimizer: torch.optim.Optimizer):
    """Let an optimizer update one tensor at a time; updating all at once (foreach) needs a copy of all tensors."""
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings["foreach"] = False


def uses_foreach_by_default(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """True if an optimizer updates all weights at once (foreach) only because that is PyTorch's default on a GPU."""
    settings = optimizer.defaults
    is_default = settings.get("foreach", False) is None and not settings.get("fused") and device.type == "cuda"
    return is_default and not settings.get("differentiable")
