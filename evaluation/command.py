"""A judge that is a command of the user's own."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator

from evaluation.pairs import Task
from evaluation.prompts import read_verdict
from evaluation.verdicts import MisassignedVerdicts, Verdict
from utils import UserError


class Command:
    """Reads a JSON object {prompt, a, b} a line, and prints a verdict a line: A (the first), B, or tie."""

    sees_order = True

    def __init__(self, command: str):
        self.command = command

    def judge(self, tasks: list[Task]) -> Iterator[tuple[Task, Verdict]]:
        """Verdicts in the order of the tasks.

        Raises: UserError if a line is no verdict, or the command fails or prints more or fewer.
        """
        name = f"judge_command={self.command!r}"
        process = subprocess.Popen(
            self.command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            errors="replace",
        )  # fmt: skip

        def write():  # beside reading, as a command may print only once it has read all
            with contextlib.suppress(OSError), process.stdin:  # it has ended, which its exit code tells
                for task in tasks:
                    texts = dict(zip(("a", "b"), task.texts, strict=True))
                    process.stdin.write(json.dumps({"prompt": task.pair.prompt, **texts}) + "\n")
                    process.stdin.flush()

        threading.Thread(target=write, daemon=True).start()
        left = list(reversed(tasks))
        try:
            for line in process.stdout:
                if (winner := read_verdict(line)) is None:
                    raise UserError(f"{name} printed {line[:200]!r}: expected A, B or tie, a line for each pair")
                if not left:
                    raise MisassignedVerdicts(f"{name} printed more verdicts than there are pairs; none is kept")
                yield left.pop(), Verdict(winner)
            code = process.wait()
        finally:
            process.kill()
            process.stdout.close()
        if code != 0 or left:
            raise UserError(
                f"{name} ended with exit code {code} after {len(tasks) - len(left)} of {len(tasks)} verdicts, which "
                "are kept; mend it, and the same command goes on"
            )
