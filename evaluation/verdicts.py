"""Verdicts of judges, and the file that keeps them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from basics.files import append_whole, json_line, write_errors_named
from basics.locks import locked
from evaluation.kept_lines import read_kept_lines
from evaluation.pairs import Task
from utils import UserError


@dataclass
class Verdict:
    """The better of the two responses shown, or the kind of failure; a single response has only a score."""

    winner: str | None = None  # "first", "second" or "tie"; "scored" for a single response
    failure: str | None = None  # its kind, such as timeout
    details: dict = field(default_factory=dict)  # also kept in the file: the answer, scores, tokens


class Judge(Protocol):
    """The interface of all judges."""

    def judge(self, tasks: list[Task]) -> Iterator[tuple[Task, Verdict]]:
        """Yield a verdict on each task, once, in any order."""


class MisassignedVerdicts(UserError):
    """It isn't clear which verdicts belong to which tasks, so none of them may be kept."""


class VerdictFile:
    """A file of verdicts, in JSON Lines. One process at a time writes to it, line by line.

    If a task has several lines, the last one counts: a later verdict replaces a failure.
    """

    def __init__(self, path: str, settings: str):
        """
        Args:
            settings: a short hash of the settings that decide a verdict.

        Raises: UserError if another process is writing to the file, or if it holds something other than verdicts, or
            verdicts under other settings.
        """
        self.path, self.settings = path, settings
        self.stack = contextlib.ExitStack()
        lock = locked(path, f"output={path}", "another process is writing there")
        self.descriptor = self.stack.enter_context(lock)
        try:
            self.lines, size = read_kept_lines(path, "verdicts", settings, _checked_key)
            os.ftruncate(self.descriptor, size)
        except BaseException:
            self.close()
            raise

    def missing(self, tasks: list[Task]) -> list[Task]:
        """Return the tasks that have no verdict yet, or only a failure.

        Raises: UserError if the file has a verdict on other texts.
        """
        for task in tasks:
            if task.key in self.lines and self.lines[task.key]["texts"] != task.digest:
                raise UserError(
                    f"output={self.path} has verdicts on other texts than those of a and b (prompt_index="
                    f"{task.pair.index}); give another file, or delete it"
                )
        return [task for task in tasks if self.lines.get(task.key, {"verdict": None})["verdict"] is None]

    def add(self, task: Task, verdict: Verdict):
        """Write a verdict, whole or not at all.

        Raises: CannotWrite.
        """
        second = "b" if task.first == "a" else "a"
        line = {
            "settings": self.settings, "texts": task.digest, "prompt_index": task.pair.index,
            "sample": task.pair.sample, "first": task.first,
            "verdict": {"first": task.first, "second": second}.get(verdict.winner, verdict.winner),
            "failure": verdict.failure, **verdict.details,
        }  # fmt: skip
        with write_errors_named(self.path):
            append_whole(self.descriptor, json_line(line))
        self.lines[task.key] = line

    @property
    def size(self) -> int:
        """The file's size (bytes)."""
        return os.fstat(self.descriptor).st_size

    def truncate(self, size: int):
        """Cut the file back to this size (bytes)."""
        os.ftruncate(self.descriptor, size)

    def close(self):
        """Release the lock; a file without verdicts is removed."""
        self.stack.close()


def _checked_key(line: dict) -> tuple[int, int, str]:
    """Return the key of a verdict's task; raise ValueError, KeyError or TypeError if the line is no verdict."""
    key = (line["prompt_index"], line["sample"], line["first"])
    line["texts"], line["failure"]  # raise KeyError if missing
    hash(key)
    if line["verdict"] not in ("a", "b", "tie", "scored", None):
        raise ValueError("no verdict")
    if line["verdict"] == "scored":
        (score,) = line["scores"]
        float(score)
    return key
