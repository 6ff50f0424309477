"""Judge responses with a command that the user provides."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator

from evaluation.pairs import Task
from evaluation.prompts import read_verdict
from evaluation.verdicts import MisassignedVerdicts, Verdict
from utils import UserError


class Command:
    """Runs a command that reads lines of JSON, {prompt, a, b}, and prints a verdict on each: A, B or tie."""

    def __init__(self, command: str):
        self.command = command

    def judge(self, tasks: list[Task]) -> Iterator[tuple[Task, Verdict]]:
        """Yield verdicts in the order of the tasks.

        Raises: UserError if a line is no verdict, or if the command fails or prints too many or too few verdicts.
        """
        name = f"judge_command={self.command!r}"
        missing = list(reversed(tasks))
        with _process_group(self.command) as process:
            threading.Thread(target=_write_tasks, args=(process, tasks), daemon=True).start()
            for line in process.stdout:
                if (winner := read_verdict(line)) is None:
                    raise UserError(f"{name} printed {line[:200]!r}: expected A, B or tie, one line per pair")
                if not missing:
                    raise MisassignedVerdicts(f"{name} printed more verdicts than there are pairs; none is kept")
                yield missing.pop(), Verdict(winner)
            code = process.wait()
        if code != 0 or missing:
            raise UserError(
                f"{name} ended with exit code {code} after {len(tasks) - len(missing)} of {len(tasks)} verdicts, which "
                "are kept; fix it and run the same judge.py command again"
            )


@contextlib.contextmanager
def _process_group(command: str) -> Iterator[subprocess.Popen]:
    """Start a shell command in its own process group, and kill all processes of the group at the end."""
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
            _kill_group(process)
        process.wait()
        process.stdout.close()


def _kill_group(process: subprocess.Popen):
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
        return
    import psutil  # on Windows, which has no process groups

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()


def _write_tasks(process: subprocess.Popen, tasks: list[Task]):
    """Write the tasks; runs in a thread, as the command may print verdicts before it has read all tasks."""
    with contextlib.suppress(OSError, ValueError), process.stdin:  # the exit code shows if the command has failed
        for task in tasks:
            texts = dict(zip(("a", "b"), task.texts, strict=True))
            process.stdin.write(json.dumps({"prompt": task.pair.prompt, **texts}) + "\n")
            process.stdin.flush()
