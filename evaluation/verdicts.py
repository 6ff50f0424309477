"""What a judge says of a pair, and the file that keeps it."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from evaluation.pairs import Task
from storage.files import read_json_lines
from storage.locks import locked
from utils import UserError


@dataclass
class Verdict:
    """Which of the two responses that were shown is better, or why that isn't known; or a response's score alone."""

    winner: str | None = None  # first, second or tie; of one response alone: scored
    failure: str | None = None  # its kind
    details: dict = field(default_factory=dict)  # what else is to be kept: an answer, scores, tokens


class Judge(Protocol):
    """What judges have in common."""

    sees_order: bool  # whether its verdict may depend on which response comes first

    def judge(self, tasks: list[Task]) -> Iterator[tuple[Task, Verdict]]:
        """Verdicts on tasks as they come, in any order, each once."""


class MisassignedVerdicts(UserError):
    """Which verdict belongs to which task isn't known, of any that came."""


class VerdictFile:
    """Verdicts as JSON Lines. One process at a time writes to it; a verdict is a line, written at once.

    Of lines on the same task the last counts, so a failure gives way to a verdict that comes later.
    """

    def __init__(self, path: str, settings: str):
        """
        Args:
            settings: a short hash of what decides a verdict.

        Raises: UserError if another process has it open, or it has lines that are no verdicts, or other settings'.
        """
        self.path, self.settings, self.lines = path, settings, {}
        self.stack = contextlib.ExitStack()
        lock = locked(path, f"output={path}", "another process is writing there")
        self.descriptor = self.stack.enter_context(lock)
        try:
            os.ftruncate(self.descriptor, self._read())
        except BaseException:
            self.close()
            raise

    def _read(self) -> int:
        """Read the verdicts that are there; return where the last whole line ends (bytes)."""
        end = 0
        try:
            for line, line_end in read_json_lines(self.path):
                if line["settings"] != self.settings:
                    raise UserError(
                        f"output={self.path} has verdicts under other settings; give another file, or delete it"
                    )
                self.lines[_checked_key(line)] = line
                end = line_end
        except UserError:
            raise
        except (ValueError, KeyError, TypeError):
            raise UserError(f"output={self.path}: a file that isn't one of verdicts; give another") from None
        return end

    def left(self, tasks: list[Task]) -> list[Task]:
        """The tasks that have no verdict yet, those that failed among them.

        Raises: UserError if there is a verdict on other texts.
        """
        for task in tasks:
            if task.key in self.lines and self.lines[task.key]["texts"] != task.digest:
                raise UserError(
                    f"output={self.path} has verdicts on other texts than those of a and b (prompt_index="
                    f"{task.pair.index}); give another file, or delete it"
                )
        return [task for task in tasks if self.lines.get(task.key, {"verdict": None})["verdict"] is None]

    def add(self, task: Task, verdict: Verdict):
        second = "b" if task.first == "a" else "a"
        line = {
            "settings": self.settings, "texts": task.digest, "prompt_index": task.pair.index,
            "sample": task.pair.sample, "first": task.first,
            "verdict": {"first": task.first, "second": second}.get(verdict.winner, verdict.winner),
            "failure": verdict.failure, **verdict.details,
        }  # fmt: skip
        self.lines[task.key] = line
        left = json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        while left:
            left = left[os.write(self.descriptor, left) :]

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def cut(self, size: int):
        """Take back all that was added since the file had this size (bytes)."""
        os.ftruncate(self.descriptor, size)

    def close(self):
        """Let another process write; a file without verdicts is removed."""
        self.stack.close()


def _checked_key(line: dict) -> tuple[int, int, str]:
    """Return the key of a verdict's task; raises an error of any kind if the line is no verdict."""
    key = (line["prompt_index"], line["sample"], line["first"])
    line["texts"], line["failure"]
    hash(key)
    if line["verdict"] not in ("a", "b", "tie", "scored", None):
        raise ValueError("no verdict")
    if line["verdict"] == "scored":
        (score,) = line["scores"]
        float(score)
    return key
