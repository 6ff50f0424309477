"""A run on a terminal and in a job's log file: aligned lines, samples, progress, times, colour."""

import contextlib
import itertools
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from basics.printing import hides_progress, on_rank0, printable, rank0_print, uses_color

LOG_FILE_WIDTH = 120  # characters
_HEADER_EVERY = 20  # lines
_PROGRESS_EVERY = 60.0  # seconds between two lines of progress in a log file
_BOLD, _DIM, _MAGENTA = "1", "2", "35"  # readable on light and on dark


def width() -> int:
    """Return how many characters fit on a line: a terminal's width less one, as some terminals wrap a full line."""
    return shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else LOG_FILE_WIDTH


def styled(text: str, *styles: str) -> str:
    """Return the text in these styles, or unchanged if colours are off."""
    return f"\033[{';'.join(styles)}m{text}\033[0m" if text and uses_color() else text


def wrapped(text: str, *styles: str) -> str:
    """Break a text into lines that fit."""
    lines = textwrap.wrap(printable(text), width(), break_on_hyphens=False)
    return "\n".join(styled(line, *styles) for line in lines)


def warning(text: str) -> str:
    """Format a warning: in bold on a terminal; on one line in a log file, so that it can be searched for."""
    text = f"WARNING: {printable(text)}"
    return wrapped(text, _BOLD, _MAGENTA) if sys.stdout.isatty() else text


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as a table with aligned columns."""
    rows = [[" ".join(printable(cell).split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---- numbers --------------------------------------------------------------------------------------------------------


def number(value: float, sign: str = "") -> str:
    """Format a number in about 6 characters, and its sign: 0.6931, 12.346, 1234.6, 1e+07, 3e-05.

    `sign`: "+" to show the sign of positive numbers, too.
    """
    if value != 0 and (abs(value) < 5e-4 or abs(value) >= 1e6):
        return f"{value:{sign}.0e}"
    n_digits = len(str(int(abs(value))))
    return f"{value:{sign}.{min(max(5 - n_digits, 0), 4)}f}"


def duration(seconds: float) -> str:
    """Format a time in its two largest units: 12s, 3m05s, 2h14m, 3d07h."""
    s = round(max(seconds, 0))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


# ---- progress -------------------------------------------------------------------------------------------------------


class Progress(contextlib.ExitStack):
    """Shows the progress of a loop that may take minutes: a bar on a terminal, a line a minute in a log file.

    A thread prints the lines, because a single batch may take longer than a minute.
    """

    def __init__(self, what: str, total: int | None, unit: str):
        """`total`: None if it isn't known; `unit`: what is counted, in the plural (examples, rows, ...)."""
        super().__init__()
        self.what, self.total, self.unit = printable(what), total, unit
        self.n_done, self.note, self.start = 0, "", time.monotonic()
        self.bar = tqdm(
            total=total, desc=self.what, leave=False, disable=hides_progress(), dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} " + unit + ", {elapsed} < {remaining}"
            "{postfix}",
        )  # fmt: skip
        self.callback(self.bar.close)
        if self.bar.disable and on_rank0():
            self.enter_context(_every_minute(self.line))

    def update(self, n: int = 1, note: str = ""):
        """Count `n` more as done; `note` follows the bar."""
        self.n_done, self.note = self.n_done + n, note
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(n)

    def line(self) -> str:
        """Return the line for a log file."""
        seconds = time.monotonic() - self.start
        of_total = "" if self.total is None else f" of {self.total:,}"
        line = f"{self.what}: {self.n_done:,}{of_total} {self.unit}, {duration(seconds)} so far"
        if self.total is not None and self.n_done > 0:
            line += f", about {duration(seconds / self.n_done * (self.total - self.n_done))} left"
        return f"{line}, {self.note}" if self.note else line


def progressing(items: Sequence, what: str, unit: str) -> Iterator:
    """Yield the items, and show how many are done."""
    with Progress(what, len(items), unit) as progress:
        for item in items:
            yield item
            progress.update()


def still_working(what: str) -> contextlib.AbstractContextManager:
    """Print a line a minute while something of unknown duration runs, such as loading a large model."""
    start = time.monotonic()
    return _every_minute(lambda: f"{what}: {duration(time.monotonic() - start)} so far")


@contextlib.contextmanager
def _every_minute(line: Callable[[], str]) -> Iterator[None]:
    """Print a line a minute, from a thread, while the block runs."""
    done = threading.Event()

    def repeat():
        while not done.wait(_PROGRESS_EVERY):
            rank0_print(line())

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def training_bar(batches: Iterable, n_batches: int, n_done: int) -> tqdm:
    """Return a progress bar over the training batches; a log file has `RunTable`'s lines instead."""
    return tqdm(
        batches, "Training", n_batches, initial=n_done, disable=hides_progress(), dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {elapsed}{postfix}",
    )  # fmt: skip


# ---- the table of a run ---------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    metric: str  # {} for the split
    width: int
    value: Callable[[float], str] = number
    change: Callable[[float], str] = partial(number, sign="+")


_ACCURACY = _Column("rewards_{}/accuracies", 6, "{:.1%}".format, lambda change: f"{change * 100:+.1f}")
_MARGIN = _Column("rewards_{}/margins", 7, partial(number, sign="+"))
_TRAINING = {"grad": _Column("grad_norm", 6), "lr": _Column("lr", 7, "{:.1e}".format)}
_PAIR_COLUMNS = {
    "loss": _Column("loss/{}", 7), "acc.": _ACCURACY, "margin": _MARGIN, "chosen": _Column("logps_{}/chosen", 7),
    "rejected": _Column("logps_{}/rejected", 8), **_TRAINING, "pairs/s": _Column("examples_per_second", 7),
}  # fmt: skip
_SFT_COLUMNS = {
    "loss": _Column("loss/{}", 7), "nll": _Column("nll_{}/chosen", 7), **_TRAINING,
    "ex./s": _Column("examples_per_second", 7),
}  # fmt: skip
_LEFT_OUT_FIRST = ("epoch", "lr", "rejected", "grad", "margin")  # in this order, if the terminal is narrow
_EXPLANATION = (
    "Each line gives means over the steps since the line before. {}; left: time to the end at the speed so far. See "
    "docs/metrics.md"
)
_ABOUT_PAIRS = (
    "acc.: pairs whose chosen response has the larger reward; margin: difference of the rewards; chosen, rejected: "
    "log-probabilities of responses (nats)"
)
_ABOUT_SFT = "nll: negative log-likelihood per token (nats)"


class RunTable:
    """Formats steps and evaluations as lines of one table; the first line chooses the columns that fit the terminal."""

    def __init__(self, n_examples: int, epoch_size: int, n_done: int = 0, former: dict[str, float] | None = None):
        """
        Args:
            n_examples: number of training examples at the end of the run.
            epoch_size: number of training examples in an epoch.
            n_done: number of examples trained on before this process.
            former: metrics of the last evaluation, if there has been one.
        """
        self.n_examples, self.epoch_size, self.n_done, self.former = n_examples, epoch_size, n_done, former or {}
        self.start, self.n_lines = time.monotonic(), 0
        self.columns: dict[str, _Column] = {}  # of metrics; chosen at the first line
        self.widths: dict[str, int] = {}  # of all columns that are shown

    def time_left(self, examples: int) -> str:
        """Return the time to the end of the run after this many examples, at its speed so far."""
        seconds = (time.monotonic() - self.start) / max(examples - self.n_done, 1) * (self.n_examples - examples)
        return duration(seconds)

    def train(self, means: dict[str, float]) -> list[str]:
        """Return the line of means over the steps since the last line, with a header above it now and then."""
        examples, lines = means["counters/examples"], self._header("train", means)
        progress = {"examples": f"{examples}/{self.n_examples}", "left": self.time_left(examples)}
        cells = self._cells("train", means) | progress
        return [*lines, self._line(cells)]

    def evaluation(self, metrics: dict[str, float]) -> list[str]:
        """Return the line of an evaluation and, below it, the changes since the last one."""
        examples, lines = metrics["counters/examples"], self._header("eval", metrics)
        if examples == self.n_done:  # the evaluation before the first step: time left is estimated from here on
            self.start = time.monotonic()
        rows = [self._cells("eval", metrics) | {"examples": f"eval {examples}"}]
        if self.former:
            change = {key: value - self.former[key] for key, value in metrics.items() if key in self.former}
            if self.former.get("rewards_eval/ties", 0) > 0.5:
                change.pop("rewards_eval/accuracies", None)  # another loss's metrics may lack it
            rows.append(self._cells("eval", change, is_change=True) | {"examples": "change"})
        self.former = dict(metrics)
        return lines + [styled(self._line(cells), _BOLD) for cells in rows]

    def _cells(self, split: str, metrics: dict[str, float], is_change: bool = False) -> dict[str, str]:
        """Format metrics, or their changes, by column."""
        cells = {}
        for name, column in self.columns.items():
            if (value := metrics.get(column.metric.format(split))) is not None:
                cells[name] = column.change(value) if is_change else column.value(value)
        if not is_change:
            cells["epoch"] = f"{metrics['counters/examples'] / self.epoch_size:.2f}"
            if metrics.get(f"rewards_{split}/ties", 0) > 0.5:  # an accuracy would mislead
                cells["acc."] = "ties"
        return cells

    def _line(self, cells: dict[str, str]) -> str:
        return "  ".join(cells.get(name, "").rjust(width) for name, width in self.widths.items()).rstrip()

    def _header(self, split: str, metrics: dict[str, float]) -> list[str]:
        """Return the lines to print above the next one: the columns' names every 20 lines, explained the first time."""
        lines = []
        if not self.columns:
            is_of_pairs = f"rewards_{split}/margins" in metrics
            self._choose_columns(_PAIR_COLUMNS if is_of_pairs else _SFT_COLUMNS)
            lines.append(wrapped(_EXPLANATION.format(_ABOUT_PAIRS if is_of_pairs else _ABOUT_SFT), _DIM))
        if self.n_lines % _HEADER_EVERY == 0:
            lines.append(styled(self._line({name: name for name in self.widths}), _DIM))
        self.n_lines += 1
        return lines

    def _choose_columns(self, columns: dict[str, _Column]):
        """Choose as many columns as fit on the terminal."""
        first = max(len("examples"), len(f"eval {self.n_examples}"), 2 * len(str(self.n_examples)) + 1)
        widths = {"examples": first, "epoch": 5, **{name: c.width for name, c in columns.items()}, "left": 6}
        for name in _LEFT_OUT_FIRST:
            if sum(widths.values()) + 2 * (len(widths) - 1) > width():
                widths.pop(name, None)
        self.columns, self.widths = columns, widths


# ---- samples --------------------------------------------------------------------------------------------------------


def sample_lines(samples: list[dict], n_shown: int = 3) -> list[str]:
    """Return lines with the first samples, shortened: each prompt, and below it each model's response.

    Lines that all prompts begin with, such as a system prompt, are left out.

    Args:
        samples: see `RunLog.log`; every model has the same prompts in the same order.
    """
    by_model: dict[str, list[dict]] = {}
    for sample in samples:
        by_model.setdefault(sample["model"], []).append(sample)
    by_prompt = list(zip(*by_model.values(), strict=True))
    if not by_prompt:
        return []
    n, n_characters = len(by_prompt), 2 * width()
    separately = ", drawn separately from each model" if len(by_model) > 1 else ""
    lines = [wrapped(f"Samples: {min(n_shown, n)} of {n}{separately}, shortened; all are in samples.jsonl", _BOLD)]
    prompts = [of_prompt[0]["prompt"].strip().split("\n") for of_prompt in by_prompt]  # as lines
    same_lines = itertools.takewhile(lambda same: len(set(same)) == 1, zip(*(p[:-1] for p in prompts), strict=False))
    n_same = len([*same_lines]) if any(prompt != prompts[0] for prompt in prompts) else 0
    for prompt, of_prompt in zip(prompts[:n_shown], by_prompt, strict=False):
        text = " ".join(" ".join(prompt[n_same:]).split())
        lines.append(wrapped(f"… {text[-n_characters:]}" if n_same or len(text) > n_characters else text, _DIM))
        for sample in of_prompt:
            response = " ".join(sample["response"].split()) or "(empty)"
            response = response if len(response) <= n_characters else f"{response[:n_characters]} …"
            lines.append(wrapped(f"{sample['model']}: {response}"))
    return lines
