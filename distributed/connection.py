"""Connect a run's workers: rendezvous, process group, heartbeat."""

import contextlib
import datetime
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from distributed import attempts, environment
from distributed.heartbeat import Heartbeat
from utils import UserError, first_line

# Long, because workers wait while one loads or writes a large model; the heartbeat notices a lost worker sooner.
_TIMEOUT = datetime.timedelta(hours=2)
_RENDEZVOUS_TIMEOUT = 60.0  # seconds for all workers to find each other


@contextlib.contextmanager
def process_group(worker_timeout: float = 600) -> Iterator[None]:
    """Connect this worker to the others inside the block: by NCCL between GPUs, by gloo between CPUs.

    This process ends if another worker is gone, or gives no sign of life for `worker_timeout` seconds.

    Raises: UserError if the launcher's variables or the timeout are invalid, if the workers don't find each other
        within a minute, or if there are too few GPUs.
    """
    environment.check_variables()
    if isinstance(worker_timeout, bool) or not isinstance(worker_timeout, int | float) or not worker_timeout > 0:
        raise UserError(f"worker_timeout={worker_timeout}: must be a number above 0 (seconds)")
    _raise_open_file_limit()
    environment.use_expandable_segments()
    local_rank, has_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if has_gpus:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs and more workers: start one worker per GPU "
                "(world_size, or the launcher's --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
    store, rank, world_size = _rendezvous()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=_TIMEOUT, store=store, rank=rank, world_size=world_size
    )
    heartbeat = Heartbeat(worker_timeout, _TIMEOUT)
    heartbeat.start()
    _check_local_ranks([worker.local_rank for worker in heartbeat.workers])
    yield  # no `finally`: after an exception the other workers end too, so there is no orderly shutdown
    dist.barrier()
    heartbeat.stop()
    dist.destroy_process_group()


def _rendezvous() -> tuple[dist.Store, int, int]:
    """Wait for all workers; return the store that connects them, this worker's rank and the world size.

    Raises: UserError if the workers don't find each other in time.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    deadline = time.monotonic() + _RENDEZVOUS_TIMEOUT
    opens_store = os.environ["RANK"] == "0" and not environment.uses_agent_store()
    results: list = []

    def connect():
        try:
            timeout = datetime.timedelta(seconds=max(deadline - time.monotonic(), 1))
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
            name = "0"
            if environment.uses_agent_store():
                name = attempts.agree_on_attempt(store, rank, world_size, deadline)
            results.append((dist.PrefixStore(f"attempt_{name}", store), rank, world_size))
        except (RuntimeError, ValueError) as error:
            results.append(error)

    try:
        if not opens_store:
            _wait_for_listener(address, int(port), deadline)
        thread = threading.Thread(target=connect, daemon=True)  # another program may listen there and never answer
        thread.start()
        thread.join(deadline - time.monotonic() + 5)
        if not results:
            raise RuntimeError("no answer")
        if isinstance(results[0], Exception):
            raise results[0]
    except (RuntimeError, ValueError, OSError) as error:
        where, remedy = f"fsdp_port={port}", "give a port that is free, or null to choose one automatically"
        if environment.is_launched_by_user():
            where = f"MASTER_ADDR={address} MASTER_PORT={port}, set by the launcher"
            remedy = (
                "the address must be that of the machine of RANK=0, the port must be free there, and all "
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} workers must start within {_RENDEZVOUS_TIMEOUT:.0f} seconds"
            )
        reason = first_line(error)[:300]
        raise UserError(f"{where}: the workers don't find each other ({reason}): {remedy}") from error
    results[0][0].set_timeout(_TIMEOUT)
    return results[0]


def _wait_for_listener(address: str, port: int, deadline: float):
    """Wait until a process listens on a port; PyTorch's own attempts take longer and print C++ stack traces.

    Raises: OSError if none does by the deadline.
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
    """Raise UserError unless each machine has consecutive ranks, whose local ranks count up from 0."""
    for rank, (previous, local_rank) in enumerate(itertools.pairwise([0, *local_ranks])):
        if local_rank not in (0, previous + 1):
            raise UserError(
                f"LOCAL_RANK={local_rank} at RANK={rank}, after LOCAL_RANK={previous}, set by the launcher: local "
                "ranks must start from 0 on each machine, and ranks must be numbered in the same order, one machine "
                "after the other (Slurm: --distribution=block)"
            )


def _raise_open_file_limit():
    """Raise the limit on open files: every worker connects to all others and opens every shard of the data."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit; macOS refuses "unlimited"
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
