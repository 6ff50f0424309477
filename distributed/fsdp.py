"""Fully sharded data parallelism: every tensor sharded over the workers, by PyTorch's FSDP2."""

import functools
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
from utils import UserError, transformer_blocks, unwrap_adapter


def fsdp_mesh(n_replicas: int) -> DeviceMesh:
    """All workers: in one row that shards a model, or in `n_replicas` rows that each hold one, sharded within."""
    n, device = dist.get_world_size(), collectives.device().type
    if n_replicas == 1:
        return init_device_mesh(device, (n,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (n_replicas, n // n_replicas), mesh_dim_names=("replicate", "shard"))


def shard_model(
    model: nn.Module, mesh: DeviceMesh, block_name: str | None, compute_dtype: torch.dtype | None, offload: bool
):
    """Shard a model, each transformer block by itself, the rest together.

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
    model = unwrap_adapter(model)  # whose forward is what generation calls, too
    for block in _blocks(model, block_name):
        shard(block)
    shard(model)


def _blocks(model: nn.Module, block_name: str | None) -> list[nn.Module]:
    blocks = transformer_blocks(model, block_name)
    if not blocks:
        raise UserError(
            f"trainer=FSDPTrainer: {type(model).__name__} doesn't say what its transformer blocks are; "
            "give their class as model.block_name"
        )
    return blocks


def run_as_forward(model: nn.Module, function: Callable, *args):
    """`function(*args)` with the parameters outside the blocks gathered, as they are while `model.forward` runs."""
    if not hasattr(model, "_run_as_forward"):
        model._run_as_forward = lambda function, *args: function(*args)
        register_fsdp_forward_method(model, "_run_as_forward")
    return model._run_as_forward(function, *args)
