"""Starting a run's processes, connecting them, and ending them together when one fails.

On one machine `run_workers` starts them. On several, or where they are to be started otherwise, a launcher does
(torchrun, or srun with the variables set as in scripts/slurm.sh).
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
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from distributed.environment import VARIABLES, is_launched
from utils import UserError

# Some wait while one loads or writes a large model. That a worker is gone is noticed by the heartbeat, and at once.
_TIMEOUT = datetime.timedelta(hours=2)
# How long (seconds) a worker waits before it reports an error that another worker may report too, or may have caused:
# whoever started the workers ends them as soon as the first has ended.
_SAME_ERROR_DELAY, _LOST_CONNECTION_DELAY = 5.0, 5.0
_GRACE_PERIOD = 1.0  # seconds that workers get to end by themselves once one has failed
_HEARTBEAT_INTERVAL = 5.0  # seconds


# ---- starting and ending --------------------------------------------------------------------------------------------


def run_workers(work: Callable, n: int, port: int | None, *args):
    """Run `work(*args)` in `n` processes of this machine, each with a launcher's variables, and wait for their end.

    If one fails, all are ended. Signals are forwarded to them.

    Raises: SystemExit with the exit code of a worker that has said why, or the traceback of one that raised;
        UserError if one was killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // n)))
    # of what killed workers leave, which is cleared away, nobody need read
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    context = mp.start_processes(_worker, (work, n, port or _free_port(), args), nprocs=n, join=False)
    with _forwarded_signals(context.pids()):
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
def _forwarded_signals(pids: list[int]) -> Iterator[None]:
    """Inside, a signal that asks the run to stop goes to the workers, which know what to do."""

    def forward(number: int, _frame):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    former = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
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
def process_group() -> Iterator[None]:
    """Inside, the workers are connected: by NCCL between GPUs, by gloo between CPUs.

    A worker ends when another is gone, whatever it is doing.

    Raises: UserError if only some of the launcher's variables are set, or there are too few GPUs.
    """
    if missing := ", ".join(name for name in VARIABLES if name not in os.environ):
        raise UserError(f"RANK is set, but not {missing}: a launcher sets {', '.join(VARIABLES)}, or none of them")
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
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    heartbeat = threading.Thread(target=_heartbeat, args=(group, done), daemon=True)
    heartbeat.start()
    yield  # after an exception the others are gone or will be: there is nothing to put in order with them
    dist.barrier()
    done.set()
    heartbeat.join()
    dist.destroy_process_group()


def _heartbeat(group: dist.ProcessGroup, done: threading.Event):
    """Exchange a number with all workers every few seconds until all are `done`; end this process if that fails.

    gloo notices a closed connection at once, where the main thread might wait for another worker's GPU for hours.
    """
    all_done = torch.tensor(0)
    try:
        while not all_done:
            done.wait(_HEARTBEAT_INTERVAL)
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


def wait_for_root_cause(error: BaseException):
    """Give another worker time to report first, where its error is the cause of this one or the same: this process is
    ended while it waits."""
    if not is_launched():
        return
    if is_lost_connection(error):
        time.sleep(_LOST_CONNECTION_DELAY)
    elif os.environ["RANK"] != "0":
        time.sleep(_SAME_ERROR_DELAY)


def is_lost_connection(error: BaseException) -> bool:
    """Whether it says that another worker is gone."""
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl", "socket")
    is_remote = isinstance(error, dist.DistError | RuntimeError)
    return is_launched() and is_remote and any(sign in str(error).lower() for sign in signs)
