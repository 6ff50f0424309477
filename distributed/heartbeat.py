"""End a worker when another worker is gone or silent, and let the worker that failed first report its error."""

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from basics.printing import printable
from distributed import environment

# Seconds that a worker waits before it reports an error that another worker may report too, or may have caused. The
# launcher ends all workers as soon as the first one exits, so only the first report appears.
_SAME_ERROR_DELAY, _LOST_CONNECTION_DELAY = 5.0, 5.0
_HEARTBEAT_INTERVAL = 5.0  # seconds, at most


class _Worker(NamedTuple):
    """A worker's process. Another process may later have the same id, but not the same start time."""

    pid: int
    started: str
    machine: str
    local_rank: int

    def kill(self):
        """Kill the process if it is on this machine and is still the same process."""
        with contextlib.suppress(OSError):
            is_here = self.machine == socket.gethostname() and self.started
            if is_here and _start_time(self.pid) == self.started:
                os.kill(self.pid, signal.SIGKILL)


def _start_time(pid: int) -> str:
    """Return when a process of this machine started, in the system's own format; "" if there is no such process."""
    if sys.platform != "linux":
        import psutil

        try:
            return str(psutil.Process(pid).create_time())
        except psutil.Error:
            return ""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


class Heartbeat:
    """Ends this process when another worker is gone or silent, whatever the main thread is doing.

    Every few seconds each worker sends rank 0 a sign of life, and rank 0 answers. Gloo notices a closed connection at
    once; the main thread might wait for hours for a lost worker's GPU. Only the time in which this process runs counts:
    if all workers are suspended and resumed together, none has been silent.
    """

    def __init__(self, timeout: float, group_timeout: datetime.timedelta):
        """Create the group for signs of life; all workers must call this.

        Args:
            timeout: seconds that another worker may be silent.
            group_timeout: the timeout of the group's messages; raised to twice `timeout` if that is longer.
        """
        self.rank, self.timeout = dist.get_rank(), timeout
        self.interval = min(_HEARTBEAT_INTERVAL, timeout / 4)
        self.group = dist.new_group(backend="gloo", timeout=max(group_timeout, datetime.timedelta(seconds=2 * timeout)))
        here = _Worker(os.getpid(), _start_time(os.getpid()), socket.gethostname(), int(os.environ["LOCAL_RANK"]))
        self.workers = [here] * dist.get_world_size()
        dist.all_gather_object(self.workers, here, self.group)
        self.awaited_rank = 0  # the worker whose sign of life is due
        self.seconds_waited = 0.0
        self.is_stopping, self.all_stopping = threading.Event(), threading.Event()
        self.exchange_thread = threading.Thread(target=self._exchange, daemon=True)

    def start(self):
        """Start exchanging signs of life, in threads beside the main one."""
        self.exchange_thread.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self):
        """Stop, and wait until all workers do."""
        self.is_stopping.set()
        self.exchange_thread.join()

    def _exchange(self):
        """Exchange signs of life until all workers stop; end the process if a connection is lost."""
        try:
            while not self.all_stopping.is_set():
                self.is_stopping.wait(self.interval)
                if self._exchange_once():
                    self.all_stopping.set()
                self.seconds_waited = 0.0
        except RuntimeError as error:
            time.sleep(2 * _LOST_CONNECTION_DELAY)  # the main thread may be about to report more
            print(printable(f"error: another worker is gone ({str(error)[:200]})"), file=sys.stderr, flush=True)
            os._exit(1)

    def _exchange_once(self) -> bool:
        """Exchange one sign of life with every worker; return True on all workers if all are stopping.

        Instead of answering, rank 0 may name a silent worker: by -1 for rank 1, -2 for rank 2 and so on.
        """
        all_stopping = torch.tensor(int(self.is_stopping.is_set()))
        if self.rank > 0:
            dist.send(all_stopping, 0, self.group)
            dist.recv(all_stopping, 0, self.group)
            if all_stopping < 0:
                self._end_for_silence(-int(all_stopping))
            return bool(all_stopping)
        other_ranks, signs = range(1, len(self.workers)), torch.zeros(len(self.workers), dtype=torch.int64)
        receipts = [dist.irecv(signs[rank], rank, self.group) for rank in other_ranks]
        for self.awaited_rank, receipt in zip(other_ranks, receipts, strict=True):
            receipt.wait()
            all_stopping *= signs[self.awaited_rank]
        for rank in other_ranks:
            dist.send(all_stopping, rank, self.group)
        return bool(all_stopping)

    def _watch(self):
        """End the process once another worker has been silent for too long."""
        tick = self.interval / 4
        # rank 0 knows which worker is silent, so the others give it time to report
        limit = self.timeout + (2 * self.interval if self.rank > 0 else 0)
        while not self.all_stopping.is_set():
            before = time.monotonic()
            time.sleep(tick)
            self.seconds_waited += min(time.monotonic() - before, 2 * tick)
            if self.seconds_waited > limit:
                if self.rank == 0:
                    self._tell_others_who_is_silent(self.awaited_rank)
                self._end_for_silence(self.awaited_rank)

    def _tell_others_who_is_silent(self, silent_rank: int):
        """Tell the other workers, which wait for rank 0's answer, which worker is silent."""
        message = torch.tensor(-silent_rank)
        others = (rank for rank in range(1, len(self.workers)) if rank != silent_rank)
        with contextlib.suppress(RuntimeError):  # another worker is gone, too
            for sending in [dist.isend(message, rank, self.group) for rank in others]:
                sending.wait(datetime.timedelta(seconds=1))

    def _end_for_silence(self, silent_rank: int):
        """Report the silent worker and end this process.

        A launcher would wait for the silent process, so kill that process, too, if it is on this machine.
        """
        silent = self.workers[silent_rank]
        if self.rank <= 1 or environment.is_local_rank0():
            text = (
                f"error: worker {silent_rank} (process {silent.pid} on {silent.machine}) has given no sign of life for "
                f"{self.timeout:g} seconds (worker_timeout): the run ends. Resume it with resume=auto"
            )
            print(printable(text), file=sys.stderr, flush=True)
        if environment.is_launched_by_user():
            silent.kill()
        os._exit(1)


def wait_for_root_cause(error: BaseException):
    """Wait before reporting an error that another worker may have caused or may report too.

    If the other worker reports first, this process is ended while it waits.
    """
    if not environment.is_launched():
        return
    if is_lost_connection(error):
        time.sleep(_LOST_CONNECTION_DELAY)
    elif os.environ["RANK"] != "0":
        time.sleep(_SAME_ERROR_DELAY)


def is_lost_connection(error: BaseException) -> bool:
    """True if the error means that another worker is gone."""
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl", "socket")
    is_remote = isinstance(error, dist.DistError | RuntimeError)
    return environment.is_launched() and is_remote and any(sign in str(error).lower() for sign in signs)
