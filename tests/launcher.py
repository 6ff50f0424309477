"""`train.py`, and scripts like it, in processes that need not import anything: they are forked from one that has.

As a script, this is that process.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from process_pool import launcher_variables

REPOSITORY = Path(__file__).parent.parent
# no network, no GPU; one thread a process, as the models are small, and two processes run at a time
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TIMEOUT = 600  # seconds
PRELOADED = ("datasets", "peft", "trainers", "transformers.models.gpt_neox.modeling_gpt_neox")


def start_server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__], env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


class Run:
    """A run of `train.py` that a `Launcher` has started: one process, or several workers."""

    def __init__(self, launcher: "Launcher", children: list[int], stdout: Path, stderr: Path):
        self.launcher, self.children, self.stdout, self.stderr = launcher, children, stdout, stderr
        self.code: int | None = None

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return "".join(path.read_text() for path in dict.fromkeys((self.stdout, self.stderr)))

    def kill(self, number: int):
        """Send a signal to each of its processes."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):  # `wait` tells
                os.kill(child, number)

    def wait(self) -> int:
        """Its exit code, or minus the signal that killed it. Where one of several workers fails, the others are ended,
        as launchers do, and it is that one's."""
        if self.code is None:
            self.code = self.launcher.ask("wait", self.children, or_else=lambda: self.kill(signal.SIGKILL))
        return self.code


class Launcher:
    """Starts runs in a directory, where their cache is, too; `kill`, `wait` and `output` are those of the last one."""

    def __init__(self, server: subprocess.Popen, directory: Path):
        self.server, self.directory, self.runs = server, directory, []

    def ask(self, method: str, argument: object, or_else: Callable = lambda: None):
        """What a method of the `Server` returns; `or_else` is called if it takes too long."""
        self.server.stdin.write(json.dumps([method, argument]) + "\n")
        self.server.stdin.flush()
        in_time = select.select([self.server.stdout], [], [], TIMEOUT)[0]
        if not in_time:
            or_else()
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
    ) -> Run:
        """Start a run, without wandb and curves unless they are asked for; `n_workers` as a launcher starts them.

        `in_order`: stdout and stderr are one, as on a terminal. `of_training`: whether the script has training's keys.
        """
        directory = directory or self.directory
        words = [str(override) for override in overrides]
        for key, word in (("wandb.", "wandb.enabled=false"), ("curves=", "curves=false")) if of_training else ():
            if not any(given.startswith(key) for given in words):
                words.append(word)
        stdout, stderr = (self.directory / f"{name}-{len(self.runs)}" for name in ("stdout", "stderr"))
        stderr = stdout if in_order else stderr
        for path in (stdout, stderr):
            path.touch()
        job = {
            "command": [str(script), *words, f"local_dirs=[{directory}/cache]"], "directory": str(directory),
            "stdout": str(stdout), "stderr": str(stderr),
            "envs": [env or {}] if n_workers == 1 else launcher_variables(n_workers),
        }  # fmt: skip
        self.runs.append(Run(self, self.ask("start", job), stdout, stderr))
        return self.runs[-1]

    def run(self, *overrides: object, **kwargs) -> int:
        """`start` and `wait`."""
        return self.start(*overrides, **kwargs).wait()

    def kill(self, number: int):
        self.runs[-1].kill(number)

    def wait(self) -> int:
        return self.runs[-1].wait()

    @property
    def output(self) -> str:
        return self.runs[-1].output

    def stop(self):
        """Kill what a failed test has left running."""
        for run in self.runs:
            if run.code is None:
                run.kill(signal.SIGKILL)
                run.wait()


# ---- the process that is forked -------------------------------------------------------------------------------------


class Server:
    """Answers each line of stdin, the name of a method and its argument, by a line."""

    def __init__(self):
        self.running: set[int] = set()
        self.codes: dict[int, int] = {}  # of those that have ended, in the order of their ends

    def serve(self):
        for name in PRELOADED:
            importlib.import_module(name)
        gc.freeze()  # or garbage collection would let each child copy all of it
        for line in sys.stdin:
            method, argument = json.loads(line)
            print(json.dumps({"start": self.start, "wait": self.wait}[method](argument)), flush=True)
        os._exit(0)  # to take all apart that was imported would take a second

    def start(self, job: dict) -> list[int]:
        """Process ids, one for each of the job's environments."""
        children = []
        for env in job["envs"]:
            child = os.fork()
            if child == 0:
                code = run_script(job, env)
                atexit._run_exitfuncs()
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
            children.append(child)
            self.codes.pop(child, None)  # the number may have been another's
        self.running.update(children)
        return children

    def wait(self, children: list[int]) -> int:
        """The exit code of the first that fails."""
        while self.running.intersection(children):
            if any(self.codes.get(child) for child in children):
                self.end(children)
            else:
                self.reap()
        return next((code for child, code in self.codes.items() if child in children and code != 0), 0)

    def end(self, children: list[int]):
        """Wait a second for those that still run, then kill them."""
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


def run_script(job: dict, env: dict[str, str]) -> int:
    """Be the script; returns the exit code."""
    os.chdir(job["directory"])
    append = os.O_WRONLY | os.O_APPEND
    for to, (path, flags) in enumerate(((os.devnull, os.O_RDONLY), (job["stdout"], append), (job["stderr"], append))):
        os.dup2(os.open(path, flags), to)
    os.environ.update(env)
    sys.argv = job["command"]
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
