"""Where a trainer's tensors live: in one process, fully sharded over several (FSDP2), or split by layers (DTensor).

A model is read by each machine's first worker alone. The others get its skeleton, a copy without weights; every worker
splits that, and takes its share of one parameter after another as the first worker sends them. So no machine holds more
than one copy of the model, and no GPU more than its share and one whole parameter.
"""

import functools
import io
import pickle
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._pytree import tree_map

import workers
from tensor_parallel import parallelize
from utils import UserError, without_wrapper

# ---- what a trainer leaves to its placement -------------------------------------------------------------------------


class Placement:
    """All in this process; where there are several GPUs, the layers have been spread over them as they were loaded."""

    device_map = "balanced"  # where models are to be loaded
    data_shard = 0, 1  # which part of each batch this worker computes, and of how many
    optimizer_args: ClassVar[dict] = {}  # for optimizers that take them

    def __init__(self, config: DictConfig):
        self.config = config

    def place(self, model: nn.Module | None, is_policy: bool) -> nn.Module:
        """Put a model where it is to be computed; the policy alone is computed in `model.policy_mp`."""
        return model

    def device(self, policy: nn.Module) -> torch.device:
        """Where batches go."""
        return policy.get_input_embeddings().weight.device

    def clip_gradient(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the gradient down to `max_norm` where it is larger; returns its norm before."""
        return nn.utils.clip_grad_norm_(parameters, max_norm).item()

    def stops_sampling(self, asked: bool) -> bool:
        """Whether generation is to end at this token, as it was `asked` to."""
        return asked


class _Spread(Placement):
    device_map = "cpu"

    def device(self, policy: nn.Module) -> torch.device:
        return workers.device()

    def clip_gradient(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        return clip_gradient(parameters, max_norm)


class FullySharded(_Spread):
    """A part of every batch and of every tensor on each worker."""

    def __init__(self, config: DictConfig):
        super().__init__(config)
        self.data_shard = workers.rank_and_world_size()
        self.mesh = fsdp_mesh(config.fsdp_replicate)

    def place(self, model: nn.Module | None, is_policy: bool) -> nn.Module:
        options, offload = self.config.model, self.config.fsdp_cpu_offload
        compute_dtype = getattr(torch, options.policy_mp) if options.policy_mp and is_policy else None
        return place(model, lambda m: shard_fully(m, self.mesh, options.block_name, compute_dtype, offload), offload)


class TensorParallel(_Spread):
    """All of every batch and a part of every layer on each worker."""

    optimizer_args: ClassVar[dict] = {"foreach": False}  # some parameters are DTensors, others not: no list holds both

    def __init__(self, config: DictConfig):
        super().__init__(config)
        self.mesh = init_device_mesh(workers.device().type, (dist.get_world_size(),))

    def place(self, model: nn.Module | None, is_policy: bool) -> nn.Module:
        return place(model, lambda m: parallelize(m, self.mesh))

    def stops_sampling(self, asked: bool) -> bool:
        return bool(workers.largest(int(asked)))  # all at the same token


# ---- spreading a model ----------------------------------------------------------------------------------------------


def place(model: nn.Module | None, split: Callable[[nn.Module], None], on_cpu: bool = False) -> nn.Module:
    """The model that the machine's first worker holds, spread over all workers; its own parameters are emptied.

    Args:
        model: None on the other workers.
        split: makes the parameters of a model DTensors; it is given one whose parameters are on the meta device.
        on_cpu: keep the parameters in the CPU's memory.
    """
    first, group = workers.machine_group()
    skeleton = _skeleton(model, first, group)
    split(skeleton)
    device = workers.device()
    _allocate(skeleton, torch.device("cpu") if on_cpu else device, device)
    with torch.no_grad():
        wholes = model.parameters() if model is not None else [None] * len(list(skeleton.parameters()))
        for parameter, whole in zip(skeleton.parameters(), wholes, strict=True):
            received = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if whole is not None:
                received.copy_(whole)
                whole.data = torch.empty(0)
            dist.broadcast(received.flatten().view(torch.uint8), first, group)
            parameter.copy_(like(parameter, received))
    return skeleton


class _SkeletonPickler(pickle.Pickler):
    """Pickles modules without the values of their parameters."""

    def reducer_override(self, value: object):
        if isinstance(value, nn.Parameter):
            return _meta_parameter, (tuple(value.shape), value.dtype, value.requires_grad)
        return NotImplemented


def _meta_parameter(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)


def _skeleton(model: nn.Module | None, first: int, group: dist.ProcessGroup) -> nn.Module:
    """A copy of the first worker's model, its parameters on the meta device."""
    pickled = io.BytesIO()
    if model is not None:
        _SkeletonPickler(pickled).dump(model)
    values = [pickled.getvalue()]
    dist.broadcast_object_list(values, first, group)
    return pickle.loads(values[0])


def _allocate(model: nn.Module, parameter_device: torch.device, buffer_device: torch.device):
    """Memory for parameters that are on the meta device; buffers keep their values."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model.to_empty(device=parameter_device)
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer.to(buffer_device)


# ---- FSDP -----------------------------------------------------------------------------------------------------------


def fsdp_mesh(n_replicas: int) -> DeviceMesh:
    """All workers: in one row that shards a model, or in `n_replicas` rows that each hold one, sharded within."""
    n, device = dist.get_world_size(), workers.device().type
    if n_replicas == 1:
        return init_device_mesh(device, (n,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (n_replicas, n // n_replicas), mesh_dim_names=("replicate", "shard"))


def shard_fully(
    model: nn.Module, mesh: DeviceMesh, block_name: str | None, compute_dtype: torch.dtype | None, offload: bool
):
    """Shard a model by FSDP2, each transformer block by itself, the rest together.

    Weights are gathered and computed in `compute_dtype`, kept in their own dtype; gradients are added up in float32 or
    better; buffers stay as they are.

    Raises: UserError if neither `block_name` nor the model says what its blocks are.
    """
    shard = functools.partial(
        fully_shard,
        mesh=mesh,
        reshard_after_forward=True,  # the root's too, or it would stay gathered after an evaluation
        mp_policy=MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.promote_types(model.dtype, torch.float32)),
        offload_policy=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    )
    model = without_wrapper(model)  # whose forward is what generation calls, too
    for block in _blocks(model, block_name):
        shard(block)
    shard(model)
    model.within_forward = lambda function, *args: function(*args)
    register_fsdp_forward_method(model, "within_forward")  # gathers what is outside the blocks, as forward does


def _blocks(model: nn.Module, block_name: str | None) -> list[nn.Module]:
    names = [block_name] if block_name is not None else list(model._no_split_modules or [])
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(
            f"trainer=FSDPTrainer: {type(model).__name__} doesn't say what its transformer blocks are; "
            "give their class as model.block_name"
        )
    return blocks


# ---- DTensors -------------------------------------------------------------------------------------------------------


def like(placed: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every worker has, in the way that `placed` is; of another shape: as a copy on each."""
    if not isinstance(placed, DTensor) or whole.ndim == 0:
        return whole
    same = whole.shape == placed.shape
    placements = placed.placements if same else [Replicate()] * placed.device_mesh.ndim
    return distribute_tensor(whole.detach(), placed.device_mesh, placements, src_data_rank=None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every worker; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: dict) -> dict:
    """A state dict with whole tensors, those that were spread in the CPU's memory of the first worker; the others get
    the rest. All must call it. What is one tensor under two names stays so."""
    collected: dict[int, torch.Tensor | None] = {}

    def collect(value: object) -> object:
        if not isinstance(value, DTensor):
            return value.detach() if isinstance(value, torch.Tensor) else value
        if id(value) not in collected:
            full = value.detach().full_tensor()  # one at a time, so that no GPU need hold all
            collected[id(value)] = full.cpu() if dist.get_rank() == 0 else None
        return collected[id(value)]

    return tree_map(collect, state)


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """`torch.nn.utils.clip_grad_norm_` over parameters of which each may be whole or sharded over any mesh."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in group])) for group in groups.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm.item()
