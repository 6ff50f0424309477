"""Verdicts of judges, and the file that keeps them."""

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from evaluation.pairs import Task
from utils import UserError, is_cut_off


@dataclass
class Verdict:
    """Which of the two responses shown is better, or why there is no answer; or that a single response was scored."""

    winner: str | None = None  # first, second or tie; scored for a single response
    failure: str | None = None  # its kind, such as timeout
    details: dict = field(default_factory=dict)  # kept with it: the answer, scores, tokens


class Judge(Protocol):
    """The interface of all judges."""

    sees_order: bool  # its verdict may depend on which response comes first

    def judge(self, tasks: list[Task]) -> Iterator[tuple[Task, Verdict]]:
        """Yield a verdict on each task, once, in any order."""


class MisassignedVerdicts(UserError):
    """It isn't known which verdict belongs to which task, so none of them may be kept."""


class VerdictFile:
    """A file of verdicts, JSON Lines: one process at a time writes to it, and each verdict is written as it comes.

    If a task has several lines the last one counts, so that a later verdict replaces a failure.
    """

    def __init__(self, path: str, settings: str):
        """
        Args:
            settings: a short hash of what decides a verdict.

        Raises: UserError if another process writes to it, or if it holds something else or verdicts under other
            settings.
        """
        self.path, self.settings, self.lines = path, settings, {}
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output={path}: another process is writing there; wait for its end") from None
        except OSError:  # a file system without locks
            pass
        self._read()

    def _read(self):
        end = 0
        with open(self.path, "rb") as file:
            for raw in file:
                if is_cut_off(raw):
                    break
                try:
                    line = json.loads(raw)
                    former, key = line["settings"], (line["prompt_index"], line["sample"], line["first"])
                    line["texts"], line["failure"]
                    hash(key)
                    if line["verdict"] not in ("a", "b", "tie", "scored", None):
                        raise ValueError("no verdict")
                    if line["verdict"] == "scored":
                        (score,) = line["scores"]
                        float(score)
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise UserError(f"output={self.path}: a file that isn't one of verdicts; give another") from None
                if former != self.settings:
                    raise UserError(
                        f"output={self.path} has verdicts under other settings; give another file, or delete it"
                    )
                self.lines[key] = line
                end += len(raw)
        os.ftruncate(self.descriptor, end)

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

        Raises: UserError if the disk is full.
        """
        second = "b" if task.first == "a" else "a"
        line = {
            "settings": self.settings, "texts": task.digest, "prompt_index": task.pair.index,
            "sample": task.pair.sample, "first": task.first,
            "verdict": {"first": task.first, "second": second}.get(verdict.winner, verdict.winner),
            "failure": verdict.failure, **verdict.details,
        }  # fmt: skip
        data, size = json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n", self.size
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
        except OSError as error:
            self.truncate(size)
            raise UserError(
                f"can't write to {self.path}: {error.strerror}; make room, and the same command continues it"
            ) from error
        self.lines[task.key] = line

    @property
    def size(self) -> int:
        """The file's size (bytes)."""
        return os.fstat(self.descriptor).st_size

    def truncate(self, size: int):
        """Remove what was added since the file had this size (bytes)."""
        os.ftruncate(self.descriptor, size)

    def close(self):
        """Close the file, and remove it if it is empty."""
        if self.size == 0:
            os.remove(self.path)
        os.close(self.descriptor)
