"""Connecting a run's workers."""

import contextlib
import datetime
import itertools
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from distributed import environment
from distributed.heartbeat import Heartbeat
from utils import UserError

# Some wait while one loads or writes a large model. That a worker is gone is noticed by the heartbeat, and at once.
_TIMEOUT = datetime.timedelta(hours=2)
_RENDEZVOUS_TIMEOUT = 60.0  # seconds, for all workers to find each other, once they have started


@contextlib.contextmanager
def process_group(worker_timeout: float = 600) -> Iterator[None]:
    """Inside, the workers are connected: by NCCL between GPUs, by gloo between CPUs.

    A worker ends when another is gone, whatever it is doing, or has given no sign of life for `worker_timeout` seconds.

    Raises: UserError if the launcher's variables or the timeout can't be, if the workers don't find each other within a
        minute, or if there are too few GPUs.
    """
    environment.check_variables()
    if isinstance(worker_timeout, bool) or not isinstance(worker_timeout, int | float) or not worker_timeout > 0:
        raise UserError(f"worker_timeout={worker_timeout}: must be a number above 0 (seconds)")
    _raise_open_file_limit()
    local_rank, has_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if has_gpus:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs and more workers: start one for each GPU "
                "(world_size, or the launcher's --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
    store, rank, world_size = _rendezvous()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=_TIMEOUT, store=store, rank=rank, world_size=world_size
    )
    heartbeat = Heartbeat(worker_timeout, _TIMEOUT)
    heartbeat.start()
    _check_local_ranks(heartbeat.local_ranks)
    yield  # after an exception the others are gone or will be: there is nothing to put in order with them
    dist.barrier()
    heartbeat.stop()
    dist.destroy_process_group()


def _rendezvous() -> tuple[dist.Store, int, int]:
    """The store through which the workers find each other, once all are there; this one's rank, and how many there are.

    Raises: UserError if they don't find each other in time.
    """
    rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    deadline = time.monotonic() + _RENDEZVOUS_TIMEOUT
    # torchrun's agents have opened one before
    opens_store = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    results: list = []

    def connect():
        try:
            timeout = datetime.timedelta(seconds=max(deadline - time.monotonic(), 1))
            results.append(next(dist.rendezvous("env://", timeout=timeout)))
        except (RuntimeError, ValueError) as error:
            results.append(error)

    try:
        if not opens_store:
            _wait_for_listener(address, int(port), deadline)
        thread = threading.Thread(target=connect, daemon=True)  # what listens there might be no store, and never answer
        thread.start()
        thread.join(deadline - time.monotonic() + 5)
        if not results:
            raise RuntimeError("no answer")
        if isinstance(results[0], Exception):
            raise results[0]
    except (RuntimeError, ValueError, OSError) as error:
        where, remedy = f"fsdp_port={port}", "give a port that is free, or null to have one chosen"
        if environment.is_launched_by_user():
            where = f"MASTER_ADDR={address} MASTER_PORT={port}, set by the launcher"
            remedy = (
                "there the worker with RANK=0 must be found, at a port that is free on its machine, and all "
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} workers must start within {_RENDEZVOUS_TIMEOUT:.0f} seconds"
            )
        reason = str(error).splitlines()[0][:300]
        raise UserError(f"{where}: the workers don't find each other ({reason}): {remedy}") from error
    store, *rank_and_world_size = results[0]
    store.set_timeout(_TIMEOUT)
    return dist.PrefixStore("default_pg", store), *rank_and_world_size


def _wait_for_listener(address: str, port: int, deadline: float):
    """Wait until somebody listens at a port; PyTorch's own attempts take longer and print stacks.

    Raises: OSError if nobody does by the deadline.
    """
    while True:
        try:
            socket.create_connection((address, port), timeout=max(deadline - time.monotonic(), 1)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _check_local_ranks(local_ranks: list[int]):
    """Raises UserError if they aren't numbered from 0 on each machine, machine after machine."""
    for rank, (former, local_rank) in enumerate(itertools.pairwise([0, *local_ranks])):
        if local_rank not in (0, former + 1):
            raise UserError(
                f"LOCAL_RANK={local_rank} at RANK={rank}, after LOCAL_RANK={former}, set by the launcher: a machine's "
                "workers are numbered from 0, and among all workers in the same order, machine after machine (Slurm: "
                "--distribution=block)"
            )


def _raise_open_file_limit():
    """Every worker opens connections to all others, and files of every shard of the data."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
