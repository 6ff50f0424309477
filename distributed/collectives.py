"""Collective operations: all processes of a run must call them, in the same order.

In a run of one process they return what they are given.
"""

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


def all_gather_object(value: object) -> list:
    """Return the values of all ranks, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(numbers: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def all_reduce_max(number: int) -> int:
    """The largest of all ranks' numbers."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number, device=device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def barrier():
    """Wait until all ranks have called this."""
    if dist.is_initialized():
        dist.barrier()


def local_group() -> tuple[int, dist.ProcessGroup]:
    """The processes of this machine: the rank of the first, and their group."""
    first = dist.get_rank() - int(os.environ["LOCAL_RANK"])
    all_firsts = all_gather_object(first)
    groups = {
        key: dist.new_group([rank for rank, value in enumerate(all_firsts) if value == key])
        for key in sorted(set(all_firsts))
    }
    return first, groups[first]
