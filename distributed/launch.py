"""Starting a run's processes, connecting them, and ending them together when one fails.

On one machine `run_workers` starts them. On several, or where they are to be started otherwise, a launcher does
(torchrun, or srun with the variables set as in scripts/slurm.sh).
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
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from distributed.environment import is_launched
from utils import UserError

_GRACE_PERIOD = 1.0  # seconds that workers get to end by themselves once one has failed


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
    reserved = _reserve_port()  # until the workers have ended
    job = (work, n, port or reserved.getsockname()[1], os.getpid(), args)
    context = mp.start_processes(_worker, job, nprocs=n, join=False)
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


def _worker(local_rank: int, work: Callable, n: int, port: int, parent: int, args: tuple):
    os.setpgrp()  # Ctrl-C in a terminal reaches the parent alone, which passes it on
    mp._prctl_pr_set_pdeathsig(signal.SIGKILL)  # whatever ends the parent, nobody trains on unseen
    if os.getppid() != parent:  # it had ended before that
        os._exit(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(n))
    os.environ.update(RANK=str(local_rank), LOCAL_RANK=str(local_rank), DPO_STARTED_BY="train.py")
    try:
        work(*args)
    except SystemExit as error:
        end_process(error.code)
    end_process(0)


def end_process(code: int | str | None):
    """End a worker, with an exit code or a message, as the interpreter's end would, but for taking itself apart.

    Then threads that still wait for other workers would abort the process, and its code would be lost.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
    multiprocessing.util._exit_function()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


@contextlib.contextmanager
def exit_code_kept() -> Iterator[None]:
    """Let a launcher's worker end by `end_process` after what is inside."""
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


def _reserve_port() -> socket.socket:
    """Return a socket bound to a free port: no other process is given that port, yet a worker can listen on it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
