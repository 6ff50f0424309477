"""Run functions of a test module in several processes, connected as a run's workers are."""

import multiprocessing
import os
import socket
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import wait

TIMEOUT = 300  # seconds
RESERVED: deque[socket.socket] = deque(maxlen=64)  # older sockets are closed, which frees their ports


def reserve_port() -> str:
    """Return a port on which nobody listens, and which the system gives to no other process during the test."""
    RESERVED.append(socket.socket())
    RESERVED[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    RESERVED[-1].bind(("127.0.0.1", 0))
    return str(RESERVED[-1].getsockname()[1])


def launcher_variables(n_workers: int) -> list[dict[str, str]]:
    """Return the environment that a launcher sets for each worker of a run on this machine."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": reserve_port(), "WORLD_SIZE": str(n_workers)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_workers)]


class Workers:
    """Processes that run a function together, one call after the other."""

    def __init__(self, n_workers: int, prepare: Callable | None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["conftest", "train", "trainers", "models", "launcher", "peft"])
        self.pipes, self.processes = [], []
        for variables in launcher_variables(n_workers):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=work, args=(theirs, variables, prepare), daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def run(self, function: Callable, *args, **kwargs) -> list:
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results, missing = {}, list(self.pipes)
        while missing:
            ready = wait(missing, TIMEOUT)
            assert ready, f"{function.__name__}: no answer in {TIMEOUT} seconds"
            for pipe in ready:
                error, results[pipe] = pipe.recv()
                assert error is None, error
                missing.remove(pipe)
        return [results[pipe] for pipe in self.pipes]

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()


def work(pipe, variables: dict[str, str], prepare: Callable | None):
    """Run in a worker: answer each (function, args, kwargs) with (error, result)."""
    import torch
    from launcher import shrink_toy

    from distributed import connection

    os.environ.update(variables)
    torch.set_num_threads(1)
    shrink_toy()
    if prepare is not None:
        prepare()
    with connection.process_group():
        while True:
            function, args, kwargs = pipe.recv()
            try:
                pipe.send((None, function(*args, **kwargs)))
            except BaseException:  # pytest's failures aren't Exceptions
                pipe.send((traceback.format_exc(), None))


class ProcessPool:
    """Workers for each world size in use.

    If a function fails in one worker, the others may wait for it forever. So all workers of that size are killed, and
    new ones are started at the next call.
    """

    def __init__(self, prepare: Callable | None = None):
        self.prepare = prepare
        self.workers: dict[int, Workers] = {}

    def run(self, n_workers: int, function: Callable, *args, **kwargs) -> list:
        """Return the function's results, in the order of the `n_workers`; raises if it fails on any of them."""
        if n_workers not in self.workers:
            self.workers[n_workers] = Workers(n_workers, self.prepare)
        try:
            return self.workers[n_workers].run(function, *args, **kwargs)
        except BaseException:
            self.workers.pop(n_workers).stop()
            raise

    def stop(self):
        for workers in self.workers.values():
            workers.stop()
