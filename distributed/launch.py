"""The processes of a run, one for each device: how they start, find one another, agree and end together.

On one machine `start` makes them. On several, or where they are to be made otherwise, a launcher does (torchrun, or
srun with the variables set as in scripts/slurm.sh) and says by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT which is which. Without `joined`, a process is the only one, and all that is asked of others is its own.
"""

import contextlib
import datetime
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import DictConfig
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from utils import UserError

# Some wait while one loads or writes a large model. That a worker is gone is noticed by other means, and at once.
_TIMEOUT = datetime.timedelta(hours=2)
# A worker whose error may be the consequence of another's, or the same, holds it back for so long (seconds): whoever
# started the workers ends them as soon as the first has ended.
_SAME_ERROR_DELAY, _LOST_CONNECTION_DELAY = 5.0, 5.0
_GRACE_PERIOD = 1.0  # seconds that workers get to end by themselves once one has failed
_SIGN_OF_LIFE_INTERVAL = 5.0  # seconds
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether a launcher has made this process one of several."""
    return "RANK" in os.environ


def by_launcher() -> bool:
    """Whether it was one that the user has started, not `start`."""
    return is_launched() and "DPO_STARTED_BY" not in os.environ


def n_workers(config: DictConfig) -> int:
    """How many processes the run has, on all machines."""
    if is_launched():
        return int(os.environ["WORLD_SIZE"])
    if config.trainer == "BasicTrainer":
        return 1
    return config.world_size or torch.cuda.device_count() or 1


def rank_and_world_size() -> tuple[int, int]:
    """Which worker this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads_machine() -> bool:
    """Whether this is the machine's first worker, which does what is to be done once a machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def device() -> torch.device:
    """The device that this worker computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# ---- starting and ending --------------------------------------------------------------------------------------------


def start(work: Callable, n: int, port: int | None, *args):
    """Run `work(*args)` in `n` processes of this machine, each with the variables of a launcher, to their end.

    If one fails, all end. Signals are passed on to them.

    Raises: SystemExit with the exit code of a worker that has said why, or the traceback of one that raised;
        UserError if one was killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // n)))
    # of what killed workers leave, which is cleared away, nobody need read
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    context = mp.start_processes(_worker, (work, n, port or _free_port(), args), nprocs=n, join=False)
    with _passed_on(context.pids()):
        try:
            while not context.join(grace_period=_GRACE_PERIOD):
                pass
        except ProcessExitedException as error:
            if error.exit_code > 0:
                sys.exit(error.exit_code)
            raise UserError(
                f"worker {error.error_index} of {n} (process {error.error_pid}) was killed by {error.signal_name}, and "
                "the others with it. If it was not you: was the machine out of memory (see dmesg)?"
            ) from None
        except ProcessRaisedException as error:
            sys.exit(str(error))  # the worker's traceback


def _worker(local_rank: int, work: Callable, n: int, port: int, args: tuple):
    os.setpgrp()  # Ctrl-C in a terminal reaches the parent alone, which passes it on
    mp._prctl_pr_set_pdeathsig(signal.SIGKILL)  # whatever ends the parent, nobody trains on unseen
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(n))
    os.environ.update(RANK=str(local_rank), LOCAL_RANK=str(local_rank), DPO_STARTED_BY="train.py")
    work(*args)


@contextlib.contextmanager
def _passed_on(pids: list[int]) -> Iterator[None]:
    """While it is entered, signals that ask the run to stop go to the workers, which know what to do."""

    def pass_on(number: int, _frame):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    former = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """While it is entered, the workers can exchange data: through NCCL between GPUs, through gloo between CPUs.

    A worker ends when another is gone, whatever it is doing.

    Raises: UserError if only some of the launcher's variables are set, or there are too few GPUs.
    """
    if missing := ", ".join(name for name in _VARIABLES if name not in os.environ):
        raise UserError(f"RANK is set, but not {missing}: a launcher sets {', '.join(_VARIABLES)}, or none of them")
    _raise_open_file_limit()
    local_rank, has_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if has_gpus:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs and more workers: start one for each GPU "
                "(world_size, or the launcher's --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=_TIMEOUT)
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(dist.new_group(backend="gloo", timeout=_TIMEOUT), done), daemon=True)
    watch.start()
    yield  # after an exception the others are gone or will be: there is nothing to put in order with them
    dist.barrier()
    done.set()
    watch.join()
    dist.destroy_process_group()


def _watch(group: dist.ProcessGroup, done: threading.Event):
    """Exchange a sign of life with all workers until all are `done`.

    Through gloo a closed connection is an error at once; a worker that waits for another's GPU would wait for hours.
    """
    all_done = torch.tensor(0)
    try:
        while not all_done:
            done.wait(_SIGN_OF_LIFE_INTERVAL)
            all_done.fill_(done.is_set())
            dist.all_reduce(all_done, op=dist.ReduceOp.MIN, group=group)
    except RuntimeError as error:
        time.sleep(2 * _LOST_CONNECTION_DELAY)  # the main thread may be about to say more
        print(f"error: another worker is gone ({str(error)[:200]})", file=sys.stderr, flush=True)
        os._exit(1)


def _raise_open_file_limit():
    """Every worker opens connections to all others, and files of every shard of the data."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def hold_back(error: BaseException):
    """Wait where another worker's error is likely to be the cause, or the same: if so, this process is ended now."""
    if not is_launched():
        return
    if lost_connection(error):
        time.sleep(_LOST_CONNECTION_DELAY)
    elif os.environ["RANK"] != "0":
        time.sleep(_SAME_ERROR_DELAY)


def lost_connection(error: BaseException) -> bool:
    """Whether it says that another worker is gone."""
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl", "socket")
    is_remote = isinstance(error, dist.DistError | RuntimeError)
    return is_launched() and is_remote and any(sign in str(error).lower() for sign in signs)


# ---- agreeing -------------------------------------------------------------------------------------------------------


def from_first(value: object) -> object:
    """The first worker's value; what the others give is ignored."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: object) -> list:
    """What each worker gives, in their order, on every worker."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def total(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over all workers, of the same shape."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def largest(number: int) -> int:
    """The largest of the workers' numbers."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number, device=device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def wait():
    """Wait for all workers."""
    if dist.is_initialized():
        dist.barrier()


def machine_group() -> tuple[int, dist.ProcessGroup]:
    """This machine's workers: the rank of the first, and their group."""
    first = dist.get_rank() - int(os.environ["LOCAL_RANK"])
    firsts = gathered(first)
    groups = {of: dist.new_group([rank for rank, its in enumerate(firsts) if its == of]) for of in sorted(set(firsts))}
    return first, groups[first]
