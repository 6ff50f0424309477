"""Notice when another worker is gone or silent, and let the worker that failed first report its error."""

import datetime
import os
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist

from basics.printing import printable
from distributed import environment

# A worker waits this long (seconds) before it reports an error that another worker may report too, or may have caused.
# Whoever started the workers ends them as soon as the first one exits, so only the first report appears.
_SAME_ERROR_DELAY, _LOST_CONNECTION_DELAY = 5.0, 5.0
_HEARTBEAT_INTERVAL = 5.0  # seconds, at most


class Heartbeat:
    """Ends this process when another worker is gone or silent, whatever the main thread is doing.

    Every few seconds each worker sends rank 0 a sign of life, and rank 0 answers. A closed connection is noticed at
    once by gloo; the main thread alone might wait for the lost worker's GPU for hours. Silence counts only while this
    process itself is running: if all workers are suspended and resumed together, none has been silent.
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
        self.workers = [""] * dist.get_world_size()  # process and machine of each, for messages
        dist.all_gather_object(self.workers, f"process {os.getpid()} on {socket.gethostname()}", self.group)
        self.local_ranks = [0] * dist.get_world_size()
        dist.all_gather_object(self.local_ranks, int(os.environ["LOCAL_RANK"]), self.group)
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
        """Exchange one sign of life with every worker; return True, on all workers alike, if all are stopping."""
        all_stopping = torch.tensor(int(self.is_stopping.is_set()))
        if self.rank > 0:
            dist.send(all_stopping, 0, self.group)
            dist.recv(all_stopping, 0, self.group)
            return bool(all_stopping)
        other_ranks, is_stopping = range(1, len(self.workers)), torch.tensor(0)
        for self.awaited_rank in other_ranks:
            dist.recv(is_stopping, self.awaited_rank, self.group)
            all_stopping *= is_stopping
        for rank in other_ranks:
            dist.send(all_stopping, rank, self.group)
        return bool(all_stopping)

    def _watch(self):
        """End the process once another worker has been silent for too long."""
        tick = self.interval / 4
        # rank 0 knows which worker is silent, so it reports first
        limit = self.timeout + (2 * self.interval if self.rank > 0 else 0)
        while not self.all_stopping.is_set():
            before = time.monotonic()
            time.sleep(tick)
            self.seconds_waited += min(time.monotonic() - before, 2 * tick)
            if self.seconds_waited > limit:
                if self.rank <= 1 or environment.is_local_rank0():
                    text = (
                        f"error: worker {self.awaited_rank} ({self.workers[self.awaited_rank]}) has given no sign of "
                        f"life for {self.timeout:g} seconds (worker_timeout): the run ends. Resume it with resume=auto"
                    )
                    print(printable(text), file=sys.stderr, flush=True)
                os._exit(1)


def wait_for_root_cause(error: BaseException):
    """Wait before reporting an error that another worker may have caused or may report too.

    If that worker reports first, this process is ended while it waits.
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
