"""Noticing that another worker is gone."""

import datetime
import os
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist

from distributed import environment

# How long (seconds) a worker waits before it reports an error that another worker may report too, or may have caused:
# whoever started the workers ends them as soon as the first has ended.
_SAME_ERROR_DELAY, _LOST_CONNECTION_DELAY = 5.0, 5.0
_HEARTBEAT_INTERVAL = 5.0  # seconds, at most


class Heartbeat:
    """Ends this process when another is gone or silent, whatever the main thread is doing.

    Every few seconds each worker tells rank 0 that it lives, and rank 0 answers. gloo notices a closed connection at
    once, where the main thread might wait for another worker's GPU for hours. Silence is counted in seconds through
    which this process itself has run: when all are suspended and go on together, none has been silent.
    """

    def __init__(self, timeout: float, group_timeout: datetime.timedelta):
        """All workers must make one; `timeout` (seconds) is how long another may be silent."""
        self.rank, self.timeout = dist.get_rank(), timeout
        self.interval = min(_HEARTBEAT_INTERVAL, timeout / 4)
        self.group = dist.new_group(backend="gloo", timeout=max(group_timeout, datetime.timedelta(seconds=2 * timeout)))
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


def wait_for_root_cause(error: BaseException):
    """Give another worker time to report first, where its error is the cause of this one or the same: this process is
    ended while it waits."""
    if not environment.is_launched():
        return
    if is_lost_connection(error):
        time.sleep(_LOST_CONNECTION_DELAY)
    elif os.environ["RANK"] != "0":
        time.sleep(_SAME_ERROR_DELAY)


def is_lost_connection(error: BaseException) -> bool:
    """Whether it says that another worker is gone."""
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl", "socket")
    is_remote = isinstance(error, dist.DistError | RuntimeError)
    return environment.is_launched() and is_remote and any(sign in str(error).lower() for sign in signs)
