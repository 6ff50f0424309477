"""Run `train.py` and other scripts in processes forked from a server that has already imported everything.

Run as a script, this file is the server.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from process_pool import launcher_variables

REPOSITORY = Path(__file__).parent.parent
# no network, no GPU; one thread per process, as the models are small and two processes run at a time
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TIMEOUT = 600  # seconds
PRELOADED = (  # imports of scripts and their libraries, many of them lazy
    "checkpointing.resume", "checkpointing.same_run", "config_checks.checks", "config_checks.explanations",
    "config_checks.schema", "data.report", "data.toy", "datasets", "distributed.fsdp", "distributed.tensor_parallel",
    "hydra._internal.hydra", "hydra.core.plugins", "hydra.main", "peft", "commands.sweeps", "trainers",
    "transformers.conversion_mapping", "transformers.models.gpt_neox.modeling_gpt_neox",
)  # fmt: skip


def shrink_toy():
    """Let toy have 2,000 training examples, not 20,000, and its data report tokenize 100 of them."""
    importlib.import_module("data.toy").SPLITS["train"] = (2_000, 1)  # number of examples, seed
    importlib.import_module("data.report")._MEASURED = 100


@contextlib.contextmanager
def running_server(env: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """Start the server that runs are forked from; `env`: variables that libraries read when they are imported."""
    server = subprocess.Popen(
        [sys.executable, __file__], env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), **(env or {})},
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    yield server
    server.stdin.close()
    server.wait()


def train_after(code: str, directory: Path, command: str = "train.py") -> Path:
    """Write a script that runs this code and then `train.py`, or another command."""
    script = directory / f"after_{command}"
    script.write_text(f"{code}\nimport runpy\nrunpy.run_path({str(REPOSITORY / command)!r}, run_name='__main__')\n")
    return script


def wait_until(holds: Callable[[], object], seconds: float = 300, output: Callable[[], str] = str):
    """Wait until a condition holds; if it doesn't in time, show what `output` returns."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, output()[-3000:]
        time.sleep(0.01)


class Run:
    """A run of `train.py` that a `Launcher` has started: one process, or several workers."""

    def __init__(self, launcher: "Launcher", children: list[int], stdout: Path, stderr: Path):
        self.launcher, self.children, self.stdout, self.stderr = launcher, children, stdout, stderr
        self.code: int | None = None

    @property
    def output(self) -> str:
        """The run's output so far."""
        return "".join(path.read_text() for path in dict.fromkeys((self.stdout, self.stderr)))

    @property
    def is_running(self) -> bool:
        """True if any of its processes has not ended."""
        return any(map(_is_running, self.children))

    def wait_for(self, pattern: str):
        """Wait until its output matches."""

        def matches() -> bool:
            is_running = self.is_running
            found = re.search(pattern, self.output)
            assert found or is_running, f"it ended without {pattern!r}: {self.output[-3000:]}"
            return bool(found)

        wait_until(matches, output=lambda: self.output)

    def kill(self, signal_number: int):
        """Send a signal to each of its processes."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(child, signal_number)

    def wait(self) -> int:
        """Wait for the run's end; return its exit code, or minus the signal that killed it.

        If one of several workers fails, the others are ended, as launchers do, and the exit code is that worker's.
        """
        if self.code is None:
            self.code = self.launcher.ask("wait", self.children, on_timeout=lambda: self.kill(signal.SIGKILL))
        return self.code


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Launcher:
    """Starts runs in a directory that also holds their cache; `kill`, `wait`, `output` ... refer to the last run."""

    def __init__(self, server: subprocess.Popen, directory: Path):
        self.server, self.directory, self.runs = server, directory, []

    def ask(self, method: str, argument: object, on_timeout: Callable = lambda: None):
        """Call a method of the `Server` and return its result; call `on_timeout` if it takes too long."""
        self.server.stdin.write(json.dumps([method, argument]) + "\n")
        self.server.stdin.flush()
        in_time = select.select([self.server.stdout], [], [], TIMEOUT)[0]
        if not in_time:
            on_timeout()
        answer = json.loads(self.server.stdout.readline())
        assert in_time, f"no end in {TIMEOUT} seconds: {self.output}"
        return answer

    def start(
        self,
        *overrides: object,
        env: dict[str, str] | None = None,
        n_workers: int = 1,
        directory: Path | None = None,
        script: Path = REPOSITORY / "train.py",
        in_order: bool = False,
        of_training: bool = True,
        as_typed: bool = False,
        terminal: str | None = None,
        printed_to: str | None = None,
        forks_workers: bool = False,
    ) -> Run:
        """Start a run, by default without wandb and curves; `n_workers`: start that many workers, as torchrun would.

        `in_order`: write stdout and stderr to one file. `of_training`: the script reads training's keys. `as_typed`:
        add nothing to `overrides`. `terminal`: the device for all three streams. `printed_to`: a file for stdout and
        stderr instead of the usual two. `forks_workers`: fork the workers that the script itself starts (world_size=N),
        which saves them the imports.
        """
        directory = directory or self.directory
        words = [str(override) for override in overrides]
        added = [("wandb.", "wandb.enabled=false"), ("curves=", "curves=false")] if of_training else []
        for key, word in () if as_typed else (*added, ("local_dirs=", f"local_dirs=[{directory}/cache]")):
            if not any(given.startswith(key) for given in words):
                words.append(word)
        stdout, stderr = (self.directory / f"{name}-{len(self.runs)}" for name in ("stdout", "stderr"))
        stderr = stdout if in_order else stderr
        for path in (stdout, stderr):
            path.touch()
        job = {
            "command": [str(script), *words], "directory": str(directory), "on_terminal": terminal is not None,
            "streams": [terminal or os.devnull, *(terminal or printed_to or str(path) for path in (stdout, stderr))],
            "envs": [env or {}] if n_workers == 1 else launcher_variables(n_workers),
            "forks_workers": forks_workers,
        }  # fmt: skip
        self.runs.append(Run(self, self.ask("start", job), stdout, stderr))
        return self.runs[-1]

    def run(self, *overrides: object, **kwargs) -> int:
        """Start a run and wait for it."""
        return self.start(*overrides, **kwargs).wait()

    def kill(self, signal_number: int):
        self.runs[-1].kill(signal_number)

    def wait(self) -> int:
        return self.runs[-1].wait()

    def wait_for(self, pattern: str):
        self.runs[-1].wait_for(pattern)

    @property
    def output(self) -> str:
        return self.runs[-1].output

    def stop(self):
        """Kill processes that a failed test has left running."""
        for run in self.runs:
            if run.code is None:
                run.kill(signal.SIGKILL)
                run.wait()


# ---- the process that is forked -------------------------------------------------------------------------------------


class Server:
    """Reads a method's name and argument from each line of stdin, and answers with the result on a line of stdout."""

    def __init__(self):
        self.running: set[int] = set()
        self.codes: dict[int, int] = {}  # of processes that have ended, in that order

    def serve(self):
        modules = {name: importlib.import_module(name) for name in PRELOADED}
        modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("")  # fills its cache
        modules["hydra.core.plugins"].Plugins.instance()  # discovers the plugins
        modules["config_checks.schema"].default_config()
        # Hydra composes each config one more time to look for hydra.mode, which no test sets
        modules["hydra._internal.hydra"].Hydra.get_mode = lambda *_, **__: None
        shrink_toy()
        for split in ("train", "test"):
            modules["data.toy"].get_toy(split)
        gc.freeze()  # otherwise garbage collection would copy this memory in each child
        for line in sys.stdin:
            method, argument = json.loads(line)
            print(json.dumps({"start": self.start, "wait": self.wait}[method](argument)), flush=True)
        os._exit(0)  # skip the interpreter's teardown, which would take a second

    def start(self, job: dict) -> list[int]:
        """Start a process for each of the job's environments; return their ids."""
        children = []
        flags = (os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_APPEND)
        streams = [os.open(path, flag | os.O_NOCTTY) for path, flag in zip(job["streams"], flags, strict=True)]
        for env in job["envs"]:
            child = os.fork()
            if child == 0:
                code = run_script(job, env, streams)
                threading._shutdown()  # as at the end of an interpreter: waits for threads, ends pools of processes
                atexit._run_exitfuncs()
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
            children.append(child)
            self.codes.pop(child, None)  # an earlier process may have had this id
        for stream in streams:
            os.close(stream)
        self.running.update(children)
        return children

    def wait(self, children: list[int]) -> int:
        """Wait for all; return the exit code of the first that fails, or 0."""
        while self.running.intersection(children):
            if any(self.codes.get(child) for child in children):
                self.end(children)
            else:
                self.reap()
        return next((code for child, code in self.codes.items() if child in children and code != 0), 0)

    def end(self, children: list[int]):
        """Wait a second for processes that still run, then kill them."""
        deadline = time.monotonic() + 1
        while left := self.running.intersection(children):
            for child in left if time.monotonic() > deadline else ():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
            self.reap(os.WNOHANG)

    def reap(self, options: int = 0):
        child, status = os.waitpid(-1, options)
        if child:
            self.running.remove(child)
            self.codes[child] = os.waitstatus_to_exitcode(status)


def run_script(job: dict, env: dict[str, str], streams: list[int]) -> int:
    """Run the script in this process; return the exit code."""
    os.chdir(job["directory"])
    if job["on_terminal"]:
        os.setsid()
        import fcntl  # Windows has neither
        import termios

        fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.update(env)
    sys.argv = job["command"]
    if job["forks_workers"]:
        import torch

        torch.multiprocessing.start_processes = functools.partial(
            torch.multiprocessing.start_processes, start_method="fork"
        )
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    Server().serve()
