"""Distribute a model over the workers as DTensors, gather full tensors from it, and clip their gradients.

The first worker on each machine loads the model. It sends the others a copy without weights, and every worker splits
that copy. If the first worker hasn't read the weights (`checkpointing.unread`), every worker then reads its shards from
the files. Otherwise the first worker broadcasts one parameter after another, and each worker keeps its shard. So a
machine holds at most one copy of the model, and a GPU at most its shards and one full parameter.
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

TENSOR = "tensor"  # the name of tensor parallelism's mesh dimension


def distribute_model(model: nn.Module | None, split: Callable[[nn.Module], None], on_cpu: bool = False) -> nn.Module:
    """Distribute a model, which the first worker on each machine holds, over all workers; free the original weights.

    Args:
        model: the model on each machine's first worker, None on the others. If its parameters are on the meta device,
            its attribute `unread` reads them.
        split: turns a model's parameters on the meta device into DTensors, in place.
        on_cpu: keep the parameters in the CPU's memory.
    """
    first_rank, group = collectives.local_group()
    distributed = _broadcast_without_weights(model, first_rank, group)
    split(distributed)
    device = collectives.device()
    _allocate(distributed, torch.device("cpu") if on_cpu else device, device)
    unread = distributed.__dict__.pop("unread", None)
    if unread is not None:
        unread.read_into(distributed)
    else:
        _broadcast_parameters(model, distributed, first_rank, group)
    return distributed


def _broadcast_parameters(model: nn.Module | None, distributed: nn.Module, first_rank: int, group: dist.ProcessGroup):
    """Copy the parameters of the first worker's `model` into `distributed`, one after another."""
    full_parameters = model.parameters() if model is not None else [None] * len(list(distributed.parameters()))
    with torch.no_grad():
        for parameter, full in zip(distributed.parameters(), full_parameters, strict=True):
            received = torch.empty(parameter.shape, dtype=parameter.dtype, device=collectives.device())
            if full is not None:
                received.copy_(full)
                full.data = torch.empty(0)
            dist.broadcast(received.flatten().view(torch.uint8), first_rank, group)
            parameter.copy_(distribute_like(parameter, received))


class _PicklerWithoutWeights(pickle.Pickler):
    """Pickles modules with their parameters' shapes and dtypes, but without values."""

    def reducer_override(self, value: object):
        if isinstance(value, nn.Parameter):
            return _meta_parameter, (tuple(value.shape), value.dtype, value.requires_grad)
        return NotImplemented


def _meta_parameter(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)


def _broadcast_without_weights(model: nn.Module | None, first_rank: int, group: dist.ProcessGroup) -> nn.Module:
    """Return a copy of the first worker's model with its parameters on the meta device."""
    pickled = io.BytesIO()
    if model is not None:
        _PicklerWithoutWeights(pickled).dump(model)
    values = [pickled.getvalue()]
    dist.broadcast_object_list(values, first_rank, group)
    return pickle.loads(values[0])


def _allocate(model: nn.Module, parameter_device: torch.device, buffer_device: torch.device):
    """Allocate memory for parameters that are on the meta device; buffers keep their values."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model.to_empty(device=parameter_device)
    for name, buffer in buffers.items():
        module_name, _, key = name.rpartition(".")
        model.get_submodule(module_name)._buffers[key] = buffer.to(buffer_device)


def distribute_like(target: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor, which every worker has, like `target`; replicate it if its shape differs.

    Scalars are returned as they are, and so is any tensor if `target` isn't a DTensor.
    """
    if not isinstance(target, DTensor) or full.ndim == 0:
        return full
    has_same_shape = full.shape == target.shape
    placements = target.placements if has_same_shape else [Replicate()] * target.device_mesh.ndim
    return distribute_tensor(full.detach(), target.device_mesh, placements, src_data_rank=None)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a whole tensor on every worker; all workers must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def n_gathered(parameter: torch.Tensor) -> int:
    """Return the number of a sharded parameter's elements that a worker holds while FSDP has gathered it."""
    mesh = getattr(parameter, "device_mesh", None)
    is_split = mesh is not None and TENSOR in (mesh.mesh_dim_names or ())
    return -(-parameter.numel() // mesh[TENSOR].size()) if is_split else parameter.numel()


def full_state_dict(state: dict) -> dict:
    """Gather a state dict's sharded tensors in CPU memory on rank 0; all workers must call this.

    Other ranks get None in their place. A tensor listed under two names is gathered once.
    """
    gathered: dict[int, torch.Tensor | None] = {}

    def gather(value: object) -> object:
        if not isinstance(value, DTensor):
            return value.detach() if isinstance(value, torch.Tensor) else value
        if id(value) not in gathered:
            full = value.detach().full_tensor()  # one at a time, so that no GPU has to hold all of them
            gathered[id(value)] = full.cpu() if dist.get_rank() == 0 else None
        return gathered[id(value)]

    return tree_map(gather, state)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip like `torch.nn.utils.clip_grad_norm_`; the parameters may be on different meshes, or on none."""
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
