"""Parallel strategies: how a trainer distributes models and batches, clips gradients and stops sampling.

To add a trainer, add a strategy here, its entry in `STRATEGIES`, and a class in trainers.py. Only methods import
torch.distributed and modules that use it, so that checking a config doesn't.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn


class SingleProcess:
    """Trains in this process. If there are several GPUs, the model's layers are spread over them when it is loaded."""

    starts_workers = False  # trains in several processes
    shards_batches = False  # each worker computes a shard of every batch; otherwise every worker computes whole batches
    splits_tensors = False  # parameters are DTensors
    config_keys: ClassVar[dict] = {}  # keys of the config that only this strategy reads, with their defaults
    device_map = "balanced"  # the device map with which Transformers loads a model
    batch_shard = 0, 1  # the index of this worker's shard of each batch, and the number of shards (`n_batch_shards`)
    optimizer_args: ClassVar[dict] = {}  # passed to optimizers that accept them

    def __init__(self, config):
        self.config = config

    @staticmethod
    def n_batch_shards(config, n_workers: int) -> int:
        """Return the number of shards of every batch; several workers may compute one shard together."""
        return 1

    def gather_shards(self, value: object) -> list:
        """Return the values of all batch shards, in their order; all workers must call it."""
        return [value]

    def distribute(self, model: nn.Module | None, is_policy: bool) -> nn.Module:
        """Place a model on this strategy's devices."""
        return model

    def device(self, policy: nn.Module) -> torch.device:
        """Return the device that batches are moved to."""
        return policy.get_input_embeddings().weight.device

    @staticmethod
    def run_as_forward(model: nn.Module, function: Callable, *args):
        """Call `function(*args)`, which uses the model's parameters without calling the model's forward."""
        return function(*args)

    @staticmethod
    def token_logps(head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return log softmax(head(h))[target] in float32 or better: (N, H) and (N,) to (N,)."""
        logits = head(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(logits, targets.to(logits.device), reduction="none")

    def prepare_backward(self, policy: nn.Module, is_last: bool):
        """Prepare the backward pass of a microbatch; `is_last`: it is the last one of its step."""

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale the gradient down if its norm exceeds `max_norm`; return the norm before that, of shape ()."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def stops_sampling(self, stop_requested: bool) -> bool:
        """Return True if generation must stop at this token, because this or another worker was asked to stop."""
        return stop_requested


class _SeveralProcesses(SingleProcess):
    """Trains in several processes, with every model split over them."""

    starts_workers = True
    splits_tensors = True
    device_map = "meta"  # load no weights: each worker reads its part later, or one reads and broadcasts all
    tensor_mesh = None  # the DeviceMesh of the workers that compute each layer together with this one

    def device(self, policy: nn.Module) -> torch.device:
        from distributed import collectives

        return collectives.device()

    @property
    def optimizer_args(self) -> dict:
        # foreach can't mix the tensors that tensor parallelism has split with others
        return {} if self.tensor_mesh is None else {"foreach": False}

    @staticmethod
    def token_logps(head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from distributed import tensor_parallel

        if tensor_parallel.is_vocabulary_parallel(head):
            return tensor_parallel.vocabulary_parallel_logps(head, hidden_states, targets)
        return SingleProcess.token_logps(head, hidden_states, targets)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        from distributed import dtensor

        return dtensor.clip_grad_norm(parameters, max_norm)

    def stops_sampling(self, stop_requested: bool) -> bool:
        if self.tensor_mesh is None:
            return stop_requested
        from distributed import collectives

        # workers that compute a layer together must stop at the same token
        return bool(collectives.all_reduce_max(int(stop_requested), self.tensor_mesh.get_group()))


class FullySharded(_SeveralProcesses):
    """Gives each worker a shard of every batch and of every tensor (FSDP).

    With `tensor_parallel=N`, N neighbouring workers get the same shard of every batch and compute each layer together.
    """

    shards_batches = True
    config_keys: ClassVar[dict] = {"fsdp_replicate": 1, "fsdp_cpu_offload": False, "tensor_parallel": 1}

    def __init__(self, config):
        from distributed import collectives, fsdp

        super().__init__(config)
        rank, n_workers = collectives.rank_and_world_size()
        self.batch_shard = rank // config.tensor_parallel, self.n_batch_shards(config, n_workers)
        self.mesh, self.tensor_mesh = fsdp.make_meshes(config.fsdp_replicate, config.tensor_parallel)

    @staticmethod
    def n_batch_shards(config, n_workers: int) -> int:
        return n_workers // config.tensor_parallel

    def gather_shards(self, value: object) -> list:
        from distributed import collectives

        return collectives.all_gather_object(value)[:: self.config.tensor_parallel]

    def distribute(self, model: nn.Module | None, is_policy: bool) -> nn.Module:
        from distributed import dtensor, fsdp

        options, offload = self.config.model, self.config.fsdp_cpu_offload
        in_mixed_precision = options.policy_mp and (is_policy or options.reference_dtype is None)
        compute_dtype = getattr(torch, options.policy_mp) if in_mixed_precision else None
        if compute_dtype and not is_policy and self.config.reference_update_every is None and model is not None:
            fsdp.round_parameters(model, compute_dtype)
        # model.block_name names the policy's blocks; a reference of another architecture has different ones
        is_other_architecture = not is_policy and self.config.reference_model.name_or_path is not None

        def split(model: nn.Module):
            if self.tensor_mesh is not None:
                from distributed import tensor_parallel

                tensor_parallel.parallelize(model, self.tensor_mesh)  # first, as FSDP shards each worker's tensors
            fsdp.shard_model(
                model,
                mesh=self.mesh,
                block_name=None if is_other_architecture else options.block_name,
                compute_dtype=compute_dtype,
                offload=offload,
            )

        return dtensor.distribute_model(model, split, on_cpu=offload)

    @staticmethod
    def run_as_forward(model: nn.Module, function: Callable, *args):
        from distributed import fsdp

        return fsdp.run_as_forward(model, function, *args)

    def prepare_backward(self, policy: nn.Module, is_last: bool):
        if self.config.fsdp_replicate > 1:
            from distributed import fsdp

            fsdp.set_replica_all_reduce(policy, is_last)


class TensorParallel(_SeveralProcesses):
    """Gives each worker every whole batch and a shard of every layer."""

    def __init__(self, config):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(config)
        self.tensor_mesh = init_device_mesh(self.device(None).type, (dist.get_world_size(),))

    def distribute(self, model: nn.Module | None, is_policy: bool) -> nn.Module:
        from distributed import dtensor, tensor_parallel

        return dtensor.distribute_model(model, partial(tensor_parallel.parallelize, mesh=self.tensor_mesh))


STRATEGIES = {  # by the value of `trainer=`
    "BasicTrainer": SingleProcess,
    "FSDPTrainer": FullySharded,
    "TensorParallelTrainer": TensorParallel,
}


def trainers_with(attribute: str, value: bool) -> str:
    """Return 'trainer=A or trainer=B': all trainers whose strategies have this value of an attribute."""
    return " or ".join(f"trainer={name}" for name, other in STRATEGIES.items() if getattr(other, attribute) is value)
