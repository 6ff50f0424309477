"""Parallel strategies: where a trainer's tensors live, and what follows from it for batches, gradients and sampling.

A new trainer is a strategy here, its entry in `STRATEGIES`, and a class in trainers.py. What communicates is imported
where it is used, so that a config can be checked against a strategy without torch.distributed.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn


class SingleProcess:
    """All in this process; where there are several GPUs, the layers have been spread over them as they were loaded."""

    starts_workers = False  # trains in several processes
    shards_batches = False  # each worker computes a shard of every batch; otherwise all compute the same one
    splits_tensors = False  # parameters are DTensors
    own_keys: ClassVar[dict] = {}  # of the config, with their defaults: settings of this strategy alone
    device_map = "balanced"  # where models are to be loaded
    batch_shard = 0, 1  # which shard of each batch this worker computes, and of how many
    optimizer_args: ClassVar[dict] = {}  # for optimizers that take them

    def __init__(self, config):
        self.config = config

    def distribute(self, model: nn.Module | None, is_policy: bool) -> nn.Module:
        """Put a model where it is to be computed; the policy alone is computed in `model.policy_mp`."""
        return model

    def device(self, policy: nn.Module) -> torch.device:
        """Where batches go."""
        return policy.get_input_embeddings().weight.device

    @staticmethod
    def run_as_forward(model: nn.Module, function: Callable, *args):
        """`function(*args)`, which uses parameters of `model` otherwise than by calling it."""
        return function(*args)

    @staticmethod
    def token_logps(head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log softmax(head(h))[target], (N, H) and (N,) to (N,), in float32 or better."""
        logits = head(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(logits, targets.to(logits.device), reduction="none")

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale the gradient down to `max_norm` where it is larger; returns its norm before, of shape ()."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def stops_sampling(self, asked: bool) -> bool:
        """Whether generation is to end at this token, as it was `asked` to."""
        return asked


class _SeveralProcesses(SingleProcess):
    starts_workers = True
    splits_tensors = True
    device_map = "cpu"

    def device(self, policy: nn.Module) -> torch.device:
        from distributed import collectives

        return collectives.device()

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        from distributed import dtensor

        return dtensor.clip_grad_norm(parameters, max_norm)


class FullySharded(_SeveralProcesses):
    """A shard of every batch and of every tensor on each worker (FSDP)."""

    shards_batches = True
    own_keys: ClassVar[dict] = {"fsdp_replicate": 1, "fsdp_cpu_offload": False}

    def __init__(self, config):
        from distributed import collectives, fsdp

        super().__init__(config)
        self.batch_shard = collectives.rank_and_world_size()
        self.mesh = fsdp.fsdp_mesh(config.fsdp_replicate)

    def distribute(self, model: nn.Module | None, is_policy: bool) -> nn.Module:
        from distributed import dtensor, fsdp

        options, offload = self.config.model, self.config.fsdp_cpu_offload
        compute_dtype = getattr(torch, options.policy_mp) if options.policy_mp and is_policy else None
        is_another = not is_policy and self.config.reference_model.name_or_path is not None  # with blocks of its own
        split = partial(
            fsdp.shard_model,
            mesh=self.mesh,
            block_name=None if is_another else options.block_name,
            compute_dtype=compute_dtype,
            offload=offload,
        )
        return dtensor.distribute_model(model, split, on_cpu=offload)

    @staticmethod
    def run_as_forward(model: nn.Module, function: Callable, *args):
        from distributed import fsdp

        return fsdp.run_as_forward(model, function, *args)


class TensorParallel(_SeveralProcesses):
    """All of every batch and a shard of every layer on each worker."""

    optimizer_args: ClassVar[dict] = {"foreach": False}  # some parameters are DTensors, others not: no list holds both

    def __init__(self, config):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(config)
        self.mesh = init_device_mesh(self.device(None).type, (dist.get_world_size(),))

    def distribute(self, model: nn.Module | None, is_policy: bool) -> nn.Module:
        from distributed import dtensor, tensor_parallel

        return dtensor.distribute_model(model, partial(tensor_parallel.parallelize, mesh=self.mesh))

    @staticmethod
    def token_logps(head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from distributed import tensor_parallel

        if tensor_parallel.is_vocabulary_parallel(head):
            return tensor_parallel.vocabulary_parallel_logps(head, hidden_states, targets)
        return SingleProcess.token_logps(head, hidden_states, targets)

    def stops_sampling(self, asked: bool) -> bool:
        from distributed import collectives

        return bool(collectives.all_reduce_max(int(asked)))  # all at the same token


STRATEGIES = {  # of each trainer, by the name that `trainer=` takes
    "BasicTrainer": SingleProcess,
    "FSDPTrainer": FullySharded,
    "TensorParallelTrainer": TensorParallel,
}
