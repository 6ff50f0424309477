"""Fully sharded data parallelism with PyTorch's FSDP2: every tensor is sharded over the workers."""

import functools
import logging
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from distributed import collectives
from distributed.dtensor import TENSOR
from utils import UserError, transformer_blocks, unwrap_adapter


def make_meshes(n_replicas: int, n_tensor_parallel: int = 1) -> tuple[DeviceMesh, DeviceMesh | None]:
    """Return the mesh over which FSDP shards a model, and the mesh of tensor parallelism or None.

    If there are several replicas, FSDP's mesh is 2-D with one replica per row. The two returned meshes are slices of
    one mesh, in which the workers of a tensor-parallel group have consecutive ranks.
    """
    n_shards = dist.get_world_size() // n_replicas // n_tensor_parallel
    sizes = {"replicate": n_replicas, "shard": n_shards, TENSOR: n_tensor_parallel}
    sizes = {name: size for name, size in sizes.items() if name == "shard" or size > 1}
    whole = init_device_mesh(collectives.device().type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if TENSOR not in sizes:
        return whole, None
    # silence the warning that gathering a tensor sharded in two dimensions takes two collectives: there is no other way
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return whole[tuple(name for name in sizes if name != TENSOR)], whole[TENSOR]


def shard_model(
    model: nn.Module, mesh: DeviceMesh, block_name: str | None, compute_dtype: torch.dtype | None, offload: bool
):
    """Shard each transformer block separately, and everything else together.

    Weights keep their dtype, but are gathered and computed in `compute_dtype`. Gradients are summed in float32 or
    better. Buffers stay as they are.

    Raises: UserError if neither `block_name` nor the model names its transformer blocks.
    """
    shard = functools.partial(
        fully_shard,
        mesh=mesh,
        reshard_after_forward=True,  # by default the root would stay gathered after an evaluation
        mp_policy=MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.promote_types(model.dtype, torch.float32)),
        offload_policy=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    )
    # silence a warning about changing outputs in place, which nothing here does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model = unwrap_adapter(model)  # generation calls this module's forward, not the adapter's
    blocks = transformer_blocks(model, block_name)
    if not blocks:
        raise UserError(
            f"trainer=FSDPTrainer: {type(model).__name__} doesn't name its transformer blocks; "
            "give their class as model.block_name"
        )
    for module in [*blocks, model]:
        shard(module)


def round_parameters(model: nn.Module, dtype: torch.dtype):
    """Round a frozen model's parameters to the dtype in which FSDP gathers them: the results stay the same."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def run_as_forward(model: nn.Module, function: Callable, *args):
    """Call `function(*args)` while the parameters outside the blocks are gathered, as during `model.forward`."""
    if not hasattr(model, "_run_as_forward"):
        model._run_as_forward = lambda function, *args: function(*args)
        register_fsdp_forward_method(model, "_run_as_forward")
    return model._run_as_forward(function, *args)


def set_replica_all_reduce(model: nn.Module, enabled: bool):
    """If `enabled`, the next backward pass all-reduces gradients across replicas; else it sums them within each."""
    unwrap_adapter(model).set_requires_all_reduce(enabled)
