"""What a judge says of a pair, and the file that keeps it."""

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
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"output={self.path}: a file that isn't one of verdicts; give another") from None
                if former != self.settings:
                    raise UserError(
                        f"output={self.path} has verdicts under other settings; give another file, or delete it"
                    )
                self.lines[key] = line
                end += len(raw)
        os.ftruncate(self.descriptor, end)

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
        if self.size == 0:
            os.remove(self.path)
        os.close(self.descriptor)
