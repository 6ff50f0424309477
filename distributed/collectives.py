"""Collective operations: all processes of a run must call them, in the same order.

In a run of one process, they communicate nothing.
"""

import functools
import os

import torch
import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device() -> torch.device:
    """Return the device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def broadcast_object(value: object) -> object:
    """Return rank 0's value on all ranks; the values passed on other ranks are ignored."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_object(value: object, group: dist.ProcessGroup | None = None) -> list:
    """Return the values of all ranks, in rank order; `group`: see `all_reduce_max`."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def all_reduce_sum(numbers: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def all_reduce_max(number: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the largest of all ranks' numbers. It uses gloo: NCCL would wait until the GPU has finished its work.

    Threads other than the main one must pass their own `group`; see `thread_group`.
    """
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    return int(numbers)


def thread_group(thread: str) -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks for one thread, whose collectives must not mix with those of other threads."""
    return _thread_group(dist.group.WORLD, thread) if dist.is_initialized() else None


@functools.lru_cache(maxsize=4)  # groups are never freed, so create only one per thread
def _thread_group(_world: dist.ProcessGroup, _thread: str) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


def barrier():
    """Wait until all ranks have called this."""
    if dist.is_initialized():
        dist.barrier()


def local_group() -> tuple[int, dist.ProcessGroup]:
    """Return the first rank on this machine, and the group of this machine's processes."""
    return _local_group(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _local_group(_world: dist.ProcessGroup) -> tuple[int, dist.ProcessGroup]:
    first_rank = dist.get_rank() - int(os.environ["LOCAL_RANK"])
    first_ranks = all_gather_object(first_rank)  # for each rank, the first rank on its machine
    groups = {
        machine: dist.new_group([rank for rank, first in enumerate(first_ranks) if first == machine])
        for machine in sorted(set(first_ranks))
    }
    return first_rank, groups[first_rank]
