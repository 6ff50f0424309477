"""Models and state dicts as DTensors: spreading them over the workers, and getting full tensors back.

A model is read by each machine's first worker alone. The others get a copy of it without weights; every worker splits
that, and takes its shard of one parameter after another as the first worker broadcasts them. So no machine holds more
than one copy of the model, and no GPU more than its shards and one full parameter.
"""

import io
import pickle
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._pytree import tree_map

from distributed import collectives


def distribute_model(model: nn.Module | None, split: Callable[[nn.Module], None], on_cpu: bool = False) -> nn.Module:
    """Spread the model that the machine's first worker holds over all workers; its own parameters are emptied.

    Args:
        model: None on the other workers.
        split: makes the parameters of a model DTensors; it is given one whose parameters are on the meta device.
        on_cpu: keep the parameters in the CPU's memory.
    """
    first, group = collectives.local_group()
    spread = _broadcast_without_weights(model, first, group)
    split(spread)
    device = collectives.device()
    _allocate(spread, torch.device("cpu") if on_cpu else device, device)
    with torch.no_grad():
        full_parameters = model.parameters() if model is not None else [None] * len(list(spread.parameters()))
        for parameter, full in zip(spread.parameters(), full_parameters, strict=True):
            received = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if full is not None:
                received.copy_(full)
                full.data = torch.empty(0)
            dist.broadcast(received.flatten().view(torch.uint8), first, group)
            parameter.copy_(distribute_like(parameter, received))
    return spread


class _PicklerWithoutWeights(pickle.Pickler):
    """Pickles modules without the values of their parameters."""

    def reducer_override(self, value: object):
        if isinstance(value, nn.Parameter):
            return _meta_parameter, (tuple(value.shape), value.dtype, value.requires_grad)
        return NotImplemented


def _meta_parameter(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)


def _broadcast_without_weights(model: nn.Module | None, first: int, group: dist.ProcessGroup) -> nn.Module:
    """A copy of the first worker's model, its parameters on the meta device."""
    pickled = io.BytesIO()
    if model is not None:
        _PicklerWithoutWeights(pickled).dump(model)
    values = [pickled.getvalue()]
    dist.broadcast_object_list(values, first, group)
    return pickle.loads(values[0])


def _allocate(model: nn.Module, parameter_device: torch.device, buffer_device: torch.device):
    """Allocate parameters that are on the meta device; buffers keep their values."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model.to_empty(device=parameter_device)
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer.to(buffer_device)


def distribute_like(target: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """A full tensor, which every worker has, sharded as `target` is; replicated if it has another shape."""
    if not isinstance(target, DTensor) or full.ndim == 0:
        return full
    same = full.shape == target.shape
    placements = target.placements if same else [Replicate()] * target.device_mesh.ndim
    return distribute_tensor(full.detach(), target.device_mesh, placements, src_data_rank=None)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every worker; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(state: dict) -> dict:
    """A state dict with full tensors on rank 0, gathered into the CPU's memory; all must call it.

    The others get None for what was sharded. A tensor that stands under two names is gathered once.
    """
    gathered: dict[int, torch.Tensor | None] = {}

    def gather(value: object) -> object:
        if not isinstance(value, DTensor):
            return value.detach() if isinstance(value, torch.Tensor) else value
        if id(value) not in gathered:
            full = value.detach().full_tensor()  # one at a time, so that no GPU need hold all
            gathered[id(value)] = full.cpu() if dist.get_rank() == 0 else None
        return gathered[id(value)]

    return tree_map(gather, state)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` over parameters each of which may be full, or sharded over a mesh of its own."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    norms = [full_tensor(nn.utils.get_total_norm([p.grad for p in group])) for group in groups.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
