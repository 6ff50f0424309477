"""Start a run's workers on this machine, and end all of them if one fails.

On several machines, a launcher starts the workers instead: torchrun (scripts/torchrun.sh) or srun (scripts/slurm.sh).
"""

import atexit
import contextlib
import logging
import multiprocessing.util
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import torch.multiprocessing as mp
from omegaconf import DictConfig
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from basics.printing import printable
from distributed.environment import is_launched
from distributed.strategies import STRATEGIES
from utils import UserError, signals_handled

_GRACE_PERIOD = 1.0  # seconds; once a worker has failed, the others get this long to exit before they are killed


def must_start_workers(config: DictConfig) -> bool:
    """True if the trainer needs several processes, and no launcher has started this one."""
    return STRATEGIES[config.trainer].starts_workers and not is_launched()


def run_workers(work: Callable, n: int, port: int | None, *args):
    """Run `work(*args)` in `n` processes on this machine and wait until all have ended.

    Each process gets the same environment variables as from a launcher. If one fails, all are ended. Signals are
    forwarded to them.

    Args:
        port: the port of MASTER_PORT; None chooses a free port.

    Raises: SystemExit with the exit code of a worker that printed its error, or with the traceback of one that raised;
        UserError if a worker was killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _n_processors() // n)))
    # silence warnings about leftovers of killed workers: they are cleaned up
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    reserved = _reserve_port()  # kept open until the workers have ended
    job = (work, n, port or reserved.getsockname()[1], os.getpid(), args)
    context = mp.start_processes(_run_worker, job, nprocs=n, join=False)
    with _forwarded_signals(context.pids()):
        try:
            while not context.join(grace_period=_GRACE_PERIOD):
                pass
        except ProcessExitedException as error:
            if error.exit_code > 0:
                sys.exit(error.exit_code)
            raise UserError(
                f"worker {error.error_index} of {n} (process {error.error_pid}) was killed by {error.signal_name}; the "
                "other workers were ended too. If you didn't kill it, the machine may have run out of memory: see dmesg"
            ) from None
        except ProcessRaisedException as error:
            sys.exit(str(error))  # the worker's traceback


def _run_worker(local_rank: int, work: Callable, n: int, port: int, parent: int, args: tuple):
    os.setpgrp()  # Ctrl-C in a terminal then reaches only the parent, which forwards it
    if sys.platform == "linux":
        mp._prctl_pr_set_pdeathsig(signal.SIGKILL)  # no worker outlives the parent, however that ends
    if os.getppid() != parent:  # the parent had already ended
        os._exit(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(n))
    os.environ.update(RANK=str(local_rank), LOCAL_RANK=str(local_rank), DPO_STARTED_BY="train.py")
    try:
        work(*args)
    except SystemExit as error:
        end_process(error.code)
    end_process(0)


def _n_processors() -> int:
    """Return the number of processors that this process may use, or that the machine has (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_process(code: int | str | None):
    """Exit with a code or a message: run the exit handlers and flush the output, but skip the interpreter's teardown.

    During teardown, threads that still wait for other workers would abort the process and change its exit code.
    """
    if isinstance(code, str):
        print(printable(code), file=sys.stderr)
    multiprocessing.util._exit_function()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


@contextlib.contextmanager
def exit_code_kept() -> Iterator[None]:
    """End a launcher's worker by `end_process` when the block ends, so that its exit code reaches the launcher."""
    try:
        yield
    except SystemExit as error:
        if is_launched():
            end_process(error.code)
        raise
    if is_launched():
        end_process(0)


@contextlib.contextmanager
def _forwarded_signals(pids: list[int]) -> Iterator[None]:
    """Forward signals that stop the run to the workers, which handle them."""

    def forward(number: int, _frame):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    with signals_handled(forward):
        yield


def _reserve_port() -> socket.socket:
    """Return a socket bound to a free port: no other process gets the port, yet a worker can listen on it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
