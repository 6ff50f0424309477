"""Starting a run's processes, connecting them, and ending them together when one fails.

On one machine `run_workers` starts them. On several, or where they are to be started otherwise, a launcher does
(torchrun, or srun with the variables set as in scripts/slurm.sh).
"""

import atexit
import contextlib
import datetime
import itertools
import logging
import multiprocessing.util
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

from acceleration.gpu_settings import use_expandable_segments
from distributed import environment
from distributed.environment import is_launched
from utils import UserError

# Some wait while one loads or writes a large model. That a worker is gone is noticed by the heartbeat, and at once.
_TIMEOUT = datetime.timedelta(hours=2)
_RENDEZVOUS_TIMEOUT = 60.0  # seconds, for all workers to find each other, once they have started
# How long (seconds) a worker waits before it reports an error that another worker may report too, or may have caused:
# whoever started the workers ends them as soon as the first has ended.
_SAME_ERROR_DELAY, _LOST_CONNECTION_DELAY = 5.0, 5.0
_GRACE_PERIOD = 1.0  # seconds that workers get to end by themselves once one has failed
_HEARTBEAT_INTERVAL = 5.0  # seconds, at most


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
    use_expandable_segments()
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
    heartbeat = _Heartbeat(worker_timeout)
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


class _Heartbeat:
    """Ends this process when another is gone or silent, whatever the main thread is doing.

    Every few seconds each worker tells rank 0 that it lives, and rank 0 answers. gloo notices a closed connection at
    once, where the main thread might wait for another worker's GPU for hours. Silence is counted in seconds through
    which this process itself has run: when all are suspended and go on together, none has been silent.
    """

    def __init__(self, timeout: float):
        """All workers must make one; `timeout` (seconds) is how long another may be silent."""
        self.rank, self.timeout = dist.get_rank(), timeout
        self.interval = min(_HEARTBEAT_INTERVAL, timeout / 4)
        self.group = dist.new_group(backend="gloo", timeout=max(_TIMEOUT, datetime.timedelta(seconds=2 * timeout)))
        self.workers = [""] * dist.get_world_size()  # where each is, for messages
        dist.all_gather_object(self.workers, f"process {os.getpid()} on {socket.gethostname()}", self.group)
        self.local_ranks = [0] * dist.get_world_size()
        dist.all_gather_object(self.local_ranks, int(os.environ["LOCAL_RANK"]), self.group)
        self.awaited, self.silent_for = 0, 0.0  # whose sign of life is to come, and since when none has (seconds)
        self.done, self.all_done = threading.Event(), threading.Event()
        self.exchange = threading.Thread(target=self._exchange, daemon=True)

    def start(self):
        self.exchange.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self):
        """Wait until all workers do."""
        self.done.set()
        self.exchange.join()

    def _exchange(self):
        try:
            while not self.all_done.is_set():
                self.done.wait(self.interval)
                if self._all_done():
                    self.all_done.set()
                self.silent_for = 0.0
        except RuntimeError as error:
            time.sleep(2 * _LOST_CONNECTION_DELAY)  # the main thread may be about to say more
            print(f"error: another worker is gone ({str(error)[:200]})", file=sys.stderr, flush=True)
            os._exit(1)

    def _all_done(self) -> bool:
        """Exchange signs of life; returns whether all workers are done, the same for all."""
        done = torch.tensor(int(self.done.is_set()))
        if self.rank > 0:
            dist.send(done, 0, self.group)
            dist.recv(done, 0, self.group)
            return bool(done)
        others, of_other = range(1, len(self.workers)), torch.tensor(0)
        for self.awaited in others:
            dist.recv(of_other, self.awaited, self.group)
            done *= of_other
        for other in others:
            dist.send(done, other, self.group)
        return bool(done)

    def _watch(self):
        tick = self.interval / 4
        limit = self.timeout + (2 * self.interval if self.rank > 0 else 0)  # rank 0 knows best who it is
        while not self.all_done.is_set():
            before = time.monotonic()
            time.sleep(tick)
            self.silent_for += min(time.monotonic() - before, 2 * tick)
            if self.silent_for > limit:
                if self.rank <= 1 or environment.is_local_rank0():
                    print(
                        f"error: worker {self.awaited} ({self.workers[self.awaited]}) has given no sign of life for "
                        f"{self.timeout:g} seconds (worker_timeout): the run ends. resume=auto goes on with it",
                        file=sys.stderr,
                        flush=True,
                    )
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
