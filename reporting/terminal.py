"""How a run looks on a terminal and in a job's log file: aligned lines, samples side by side, times, colour."""

import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tqdm import tqdm

from utils import hides_progress, uses_color

LOG_FILE_WIDTH = 120  # columns, where output is not to a terminal
_HEADER_EVERY = 20  # lines
_BOLD, _DIM, _MAGENTA = "1", "2", "35"  # readable on light and on dark


def width() -> int:
    """Columns that a line may have; a terminal's last one stays free, as some break the line there."""
    return shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else LOG_FILE_WIDTH


def styled(text: str, *styles: str) -> str:
    """The text in these styles, where they are shown."""
    return f"\033[{';'.join(styles)}m{text}\033[0m" if text and uses_color() else text


def wrapped(text: str, *styles: str) -> str:
    """A sentence in lines that fit, broken between words."""
    return "\n".join(styled(line, *styles) for line in textwrap.wrap(text, width(), break_on_hyphens=False))


def warning(text: str) -> str:
    """One that is to be seen."""
    text = f"WARNING: {text}"
    return wrapped(text, _BOLD, _MAGENTA) if sys.stdout.isatty() else text  # searched for in a log file, as one line


# ---- numbers --------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """At most 6 characters, 7 with a minus sign: 0.6931, 12.346, 1234.6, 1e+07, 3e-05."""
    if value != 0 and (abs(value) < 5e-4 or abs(value) >= 1e6):
        return f"{value:.0e}"
    n_digits = len(str(int(abs(value))))
    return f"{value:.{min(max(5 - n_digits, 0), 4)}f}"


def signed(value: float) -> str:
    """The same with a plus sign."""
    return f"{'' if value < 0 else '+'}{number(value)}"


def percent(value: float) -> str:
    """A part of 1."""
    return f"{value:.1%}"


def rate(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def duration(seconds: float) -> str:
    """The two largest units: 12s, 3m05s, 2h14m, 3d07h."""
    s = round(max(seconds, 0))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


# ---- bars, where there is a terminal --------------------------------------------------------------------------------


def progress_bar(batches: Iterable, n_batches: int, n_done: int) -> tqdm:
    """A bar over the batches of a training run; what follows it is set as its postfix."""
    return tqdm(
        batches, "Training", n_batches, initial=n_done, disable=hides_progress(), dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {elapsed} < {remaining}{postfix}",
    )  # fmt: skip


def passing_bar(batches: list, what: str) -> tqdm:
    """A bar that leaves nothing behind."""
    return tqdm(
        batches, what, leave=False, disable=hides_progress(), dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} batches, {elapsed} < {remaining}",
    )  # fmt: skip


# ---- the table of a run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    name: str
    key: str  # of the metric, {} for the split
    width: int
    shown: Callable[[float], str] = number
    change: Callable[[float], str] = signed


def _points(value: float) -> str:
    return f"{value * 100:+.1f}"


_ACCURACIES = "rewards_{}/accuracies"
_COLUMNS = (
    _Column("loss", "loss/{}", 7),
    _Column("nll", "nll_{}/chosen", 7),
    _Column("acc.", _ACCURACIES, 6, percent, _points),
    _Column("margin", "rewards_{}/margins", 7, signed),
    _Column("chosen", "logps_{}/chosen", 7),
    _Column("rejected", "logps_{}/rejected", 8),
    _Column("grad", "grad_norm", 6),
    _Column("lr", "lr", 7, lambda value: f"{value:.1e}"),
    _Column("{}/s", "examples_per_second", 7, rate),
)
_OF_PAIRS, _OF_TARGETS = ("acc.", "margin", "chosen", "rejected"), ("nll",)
_LEFT_OUT_FIRST = ("epoch", "lr", "rejected", "grad", "margin")  # where a terminal is narrow


class RunTable:
    """Lines for training and for evaluations, in the same columns, as wide as the terminal is at the first one."""

    def __init__(self, n_examples: int, epoch_size: int, n_done: int = 0, former: dict[str, float] | None = None):
        """
        Args:
            n_examples: that will have been trained on at the end; `epoch_size`: of them in an epoch.
            n_done: trained on before this process.
            former: metrics of the last evaluation, if there has been one.
        """
        self.n_examples, self.epoch_size, self.n_done = n_examples, epoch_size, n_done
        self.former, self.columns, self.lines_since_header = former or {}, None, _HEADER_EVERY
        self.start = time.monotonic()

    def train(self, means: dict[str, float]) -> list[str]:
        """The line, with a header above now and then, for the means of the steps since the line before."""
        examples = means["counters/examples"]
        cells = {
            "examples": f"{examples}/{self.n_examples}",
            "epoch": f"{examples / self.epoch_size:.2f}",
            "left": duration(self.seconds_left(examples)),
        }
        return [*self._header("train", means), self._line("train", means, cells)]

    def evaluation(self, metrics: dict[str, float]) -> list[str]:
        """A line, and below it what has changed since the last evaluation."""
        examples = metrics["counters/examples"]
        epoch = f"{examples / self.epoch_size:.2f}"
        lines = self._header("eval", metrics)
        lines.append(styled(self._line("eval", metrics, {"examples": f"eval {examples}", "epoch": epoch}), _BOLD))
        if self.former:
            change = {key: value - self.former[key] for key, value in metrics.items() if key in self.former}
            if self.former.get("rewards_eval/ties", 0) > 0.5:
                del change["rewards_eval/accuracies"]
            lines.append(styled(self._line("eval", change, {"examples": "change"}, is_change=True), _BOLD))
        self.former = dict(metrics)
        return lines

    def seconds_left(self, examples: int) -> float:
        """At the speed of this process so far, with all that it has done beside training."""
        done = examples - self.n_done
        return (time.monotonic() - self.start) / done * (self.n_examples - examples) if done else 0.0

    def _header(self, split: str, metrics: dict[str, float]) -> list[str]:
        first = self.columns is None
        if first:
            self._choose_columns(split, metrics)
        self.lines_since_header += 1
        if self.lines_since_header < _HEADER_EVERY:
            return []
        self.lines_since_header = 0
        header = styled("  ".join(name.rjust(width) for name, width in self.columns.items()), _DIM)
        return [*(self._explanation() if first else []), header]

    def _choose_columns(self, split: str, metrics: dict[str, float]):
        self.is_of_pairs = f"rewards_{split}/margins" in metrics
        first = max(len("examples"), len(f"eval {self.n_examples}"), 2 * len(str(self.n_examples)) + 1)
        left_out = _OF_TARGETS if self.is_of_pairs else _OF_PAIRS
        of_metrics = [
            column
            for column in _COLUMNS
            if (column.key.format(split) in metrics or "/" not in column.key) and column.name not in left_out
        ]
        self.shown = {column.name.format("pairs" if self.is_of_pairs else "ex."): column for column in of_metrics}
        columns = {"examples": first, "epoch": 5, **{name: c.width for name, c in self.shown.items()}, "left": 6}
        for name in (*_LEFT_OUT_FIRST, None):
            if sum(columns.values()) + 2 * (len(columns) - 1) <= width() or name is None:
                break
            columns.pop(name, None)
        self.columns = columns

    def _explanation(self) -> list[str]:
        explained = (
            "acc.: pairs whose chosen response has the larger reward; margin: of the rewards; chosen, rejected: "
            "log-probabilities of responses (nats); "
        )
        text = (
            "Each line gives means over the steps since the line before. "
            + (explained if self.is_of_pairs else "nll: negative log-likelihood per token (nats); ")
            + "left: time to the end at this speed. See docs/metrics.md"
        )
        return [wrapped(text, _DIM)]

    def _line(self, split: str, metrics: dict[str, float], cells: dict[str, str], is_change: bool = False) -> str:
        are_ties = metrics.get(f"rewards_{split}/ties", 0) > 0.5 and not is_change
        for name, column in self.shown.items():
            value = metrics.get(column.key.format(split))
            if column.key == _ACCURACIES and are_ties:
                cells[name] = "ties"  # none is won, and none is lost
            elif value is not None:
                cells[name] = (column.change if is_change else column.shown)(value)
        return "  ".join(cells.get(name, "").rjust(width) for name, width in self.columns.items()).rstrip()


# ---- samples --------------------------------------------------------------------------------------------------------


def samples_side_by_side(samples: list[dict], n_shown: int = 3, n_lines: int = 4) -> list[str]:
    """The first samples, each prompt once, the policy's beside the reference's, shortened between words.

    `samples`: see `RunLog.log`; all have the first model's prompts in the same order.
    """
    by_model: dict[str, list[dict]] = {}
    for sample in samples:
        by_model.setdefault(sample["model"], []).append(sample)
    if not by_model:
        return []
    (first, *_), total = by_model.values(), width()
    column = (total - 2 - 3 * (len(by_model) - 1)) // len(by_model)
    lines = [styled(f"Samples: {min(n_shown, len(first))} of {len(first)}, shortened; all are in samples.jsonl", _BOLD)]
    for i, prompt in enumerate(sample["prompt"] for sample in first[:n_shown]):
        lines += [styled(line, _DIM) for line in _wrapped(prompt, total - 2, 2, keeps_end=True)]
        texts = [of_model[i]["response"] for of_model in by_model.values()]
        parts = [_wrapped(text, column, n_lines) for text in texts]
        parts = [[model, *part] for model, part in zip(by_model, parts, strict=True)]
        for row in range(max(map(len, parts))):
            cells = [_padded(part[row] if row < len(part) else "", column) for part in parts]
            line = f"  {' | '.join(cells)}".rstrip()
            lines.append(styled(line, _DIM) if row == 0 else line)
    return lines


def _wrapped(text: str, columns: int, n_lines: int, keeps_end: bool = False) -> list[str]:
    """Lines of a text without what could move a terminal's cursor; '…' where it goes on, or has begun before."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "(empty)"
    if any(unicodedata.east_asian_width(c) in "WF" for c in text):
        columns //= 2
    lines = textwrap.wrap(text, columns - 2)
    if len(lines) <= n_lines:
        return lines
    return (
        [f"… {lines[-n_lines]}", *lines[1 - n_lines :]]
        if keeps_end
        else [*lines[: n_lines - 1], f"{lines[n_lines - 1]} …"]
    )


def _padded(text: str, columns: int) -> str:
    n_wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return text + " " * (columns - len(text) - n_wide)
