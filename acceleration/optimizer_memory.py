"""The memory that an optimizer needs for its state, and in a step."""

import inspect
from collections import Counter

import torch
from torch import nn


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[torch.device, int]:
    """Return the bytes of the tensors that an optimizer will keep for its weights, on each device.

    Found by a step of the same optimizer on a few weights: RMSprop keeps one number for each, AdamW two.
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
    of_weights = (v for v in probing.state[probe].values() if isinstance(v, torch.Tensor) and v.shape == probe.shape)
    return sum(value.nbytes for value in of_weights) / probe.numel()


def step_one_by_one(optimizer: torch.optim.Optimizer):
    """Let an optimizer update one tensor at a time; all at once (foreach) needs a copy of all of them."""
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings["foreach"] = False


def steps_by_foreach(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """True if an optimizer's step works on all weights at once, as PyTorch's do by default on a GPU."""
    settings = optimizer.defaults
    is_default = settings.get("foreach", False) is None and not settings.get("fused") and device.type == "cuda"
    return is_default and not settings.get("differentiable")
