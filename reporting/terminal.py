"""A run on a terminal and in a job's log file: aligned lines, samples side by side, progress, times, colour."""

import collections
import contextlib
import shutil
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from basics.printing import hides_progress, on_rank0, printable, rank0_print, uses_color

LOG_FILE_WIDTH = 120  # columns, where output is not to a terminal
_HEADER_EVERY = 20  # lines
_PROGRESS_EVERY = 60.0  # seconds between two lines of progress in a log file
_BOLD, _DIM, _MAGENTA = "1", "2", "35"  # readable on light and on dark


def width() -> int:
    """Return the columns that a line may have; a terminal's last one stays free, as some break the line there."""
    return shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else LOG_FILE_WIDTH


def styled(text: str, *styles: str) -> str:
    """Return the text in these styles, or as it is where colours are not shown."""
    return f"\033[{';'.join(styles)}m{text}\033[0m" if text and uses_color() else text


def wrapped(text: str, *styles: str) -> str:
    """Return a sentence in lines that fit, broken between words."""
    lines = textwrap.wrap(printable(text), width(), break_on_hyphens=False)
    return "\n".join(styled(line, *styles) for line in lines)


def warning(text: str) -> str:
    """Return a warning: on a terminal in bold, in a log file on one line, so that it can be searched for."""
    text = f"WARNING: {printable(text)}"
    return wrapped(text, _BOLD, _MAGENTA) if sys.stdout.isatty() else text


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a table with aligned columns."""
    rows = [[" ".join(printable(cell).split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---- numbers --------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return a number in at most 6 characters, 7 with a minus sign: 0.6931, 12.346, 1234.6, 1e+07, 3e-05."""
    if value != 0 and (abs(value) < 5e-4 or abs(value) >= 1e6):
        return f"{value:.0e}"
    n_digits = len(str(int(abs(value))))
    return f"{value:.{min(max(5 - n_digits, 0), 4)}f}"


def signed(value: float) -> str:
    """Return a number with its sign: +0.6931."""
    return f"{'' if value < 0 else '+'}{number(value)}"


def percent(value: float) -> str:
    """Return a share of 1 in percent: 73.4%."""
    return f"{value:.1%}"


def rate(value: float) -> str:
    """Return a number with three digits, or as an integer from 100 on."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: 12s, 3m05s, 2h14m, 3d07h."""
    s = round(max(seconds, 0))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


# ---- progress -------------------------------------------------------------------------------------------------------


class Progress:
    """Shows how far a long stretch of work has come: by a bar on a terminal, else by a line a minute.

    Both give the total and the time left. Every loop that may take minutes uses it: data, reference, evaluation,
    samples, verdicts.
    """

    def __init__(self, what: str, total: int | None, unit: str):
        """`total`: None if it isn't known; `unit`: what is counted, in the plural (examples, rows, ...)."""
        self.what, self.total, self.unit, self.n_done = printable(what), total, unit, 0
        self.bar = tqdm(
            total=total, desc=self.what, leave=False, disable=hides_progress(), dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} " + unit + ", {elapsed} < {remaining}"
            "{postfix}",
        )  # fmt: skip
        self.start = self.last_line = time.monotonic()
        self.n_at_last_line = 0
        self.reports = _every_minute(self._report_silence) if self.bar.disable and on_rank0() else None

    def update(self, n: int = 1, note: str = ""):
        """Count `n` more as done; `note` follows the bar."""
        self.n_done += n
        if not self.bar.disable:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif on_rank0() and time.monotonic() - self.last_line >= _PROGRESS_EVERY and self.n_done != self.total:
            rank0_print(self._line(time.monotonic() - self.last_line) + (f", {note}" if note else ""))
            self.last_line, self.n_at_last_line = time.monotonic(), self.n_done

    def _line(self, seconds: float) -> str:
        """`seconds`: the time since the last line; the time left is estimated from the speed since then."""
        if self.total is None:
            return f"{self.what}: {self.n_done:,} {self.unit}"
        left = seconds / max(self.n_done - self.n_at_last_line, 1) * (self.total - self.n_done)
        return f"{self.what}: {self.n_done:,} of {self.total:,} {self.unit}, about {duration(left)} left"

    def _report_silence(self):
        """Print a line if there has been none for a minute, as a single batch may take longer."""
        now = time.monotonic()
        if now - self.last_line >= _PROGRESS_EVERY:
            total = "" if self.total is None else f" of {self.total:,}"
            rank0_print(f"{self.what}: {self.n_done:,}{total} {self.unit}, {duration(now - self.start)} so far")
            self.last_line, self.n_at_last_line = now, self.n_done

    def __enter__(self) -> "Progress":
        if self.reports is not None:
            self.reports.__enter__()
        return self

    def __exit__(self, *error):
        if self.reports is not None:
            self.reports.__exit__(*error)
        self.bar.close()


def progressing(items: Sequence, what: str, unit: str) -> Iterator:
    """Yield the items, and show how many are done."""
    with Progress(what, len(items), unit) as progress:
        for item in items:
            yield item
            progress.update()


def still_working(what: str) -> contextlib.AbstractContextManager:
    """Print a line a minute while something runs whose end can't be foreseen, such as loading a large model."""
    start = time.monotonic()
    return _every_minute(lambda: rank0_print(f"{what}: {duration(time.monotonic() - start)} so far"))


@contextlib.contextmanager
def _every_minute(report: Callable[[], None]) -> Iterator[None]:
    """Call a function once a minute, from a thread, while the block runs."""
    done = threading.Event()

    def repeat():
        while not done.wait(_PROGRESS_EVERY):
            report()

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def training_bar(batches: Iterable, n_batches: int, n_done: int) -> tqdm:
    """Return a bar over the batches of a training run; a log file has the lines of `RunTable` instead."""
    return tqdm(
        batches, "Training", n_batches, initial=n_done, disable=hides_progress(), dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {elapsed}{postfix}",
    )  # fmt: skip


# ---- the time left --------------------------------------------------------------------------------------------------

_RECENT = 100  # steps, whose speed the remaining ones are expected to have
_RECENT_PAUSES = 3  # evaluations and saves


class TimeLeft:
    """Estimates the time to the end: remaining steps at their recent speed, evaluations and saves at theirs.

    There is one clock, read at the end of each step, evaluation and save. So each second counts once, and waiting for
    data is included.
    """

    def __init__(
        self,
        n_examples: int,
        batch_size: int = 1,
        eval_every: int | None = None,
        save_every: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            n_examples: number of training examples at the end of the run.
            eval_every, save_every: in examples; None: only at the end.
        """
        self.n_examples, self.batch_size = n_examples, batch_size
        self.every = {"evaluation": eval_every, "save": save_every}
        self.clock, self.last = clock, clock()
        self.seconds_of = {"step": collections.deque(maxlen=_RECENT)}
        self.seconds_of |= {kind: collections.deque(maxlen=_RECENT_PAUSES) for kind in self.every}

    def tick(self, kind: str):
        """Count the time since the last call as that of one step, evaluation or save."""
        now = self.clock()
        self.seconds_of[kind].append(now - self.last)
        self.last = now

    def seconds(self, examples: int) -> float:
        """Return the seconds to the end of the run after this many examples."""
        n_steps = -(-(self.n_examples - examples) // self.batch_size)
        pauses = sum(self._n_to_come(kind, examples) * self._mean(kind) for kind in self.every)
        return n_steps * self._mean("step") + pauses

    def _n_to_come(self, kind: str, examples: int) -> int:
        """Return the number of evaluations or saves to come: those that are due, and one at the end."""
        every = self.every[kind] or self.n_examples
        next_one = -(-max(examples, 1) // every) * every  # at `examples` itself it comes after the line that asks
        return max(0, -(-(self.n_examples - next_one) // every)) + 1

    def _mean(self, kind: str) -> float:
        """Return the mean of the last ones' seconds, 0 if none has been measured yet."""
        seconds = self.seconds_of[kind]
        return sum(seconds) / len(seconds) if seconds else 0.0


# ---- the table of a run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    name: str
    key: str  # of the metric, {} for the split
    width: int
    shown: Callable[[float], str] = number
    change: Callable[[float], str] = signed


_ACCURACIES = "rewards_{}/accuracies"
_COLUMNS = (
    _Column("loss", "loss/{}", 7),
    _Column("nll", "nll_{}/chosen", 7),
    _Column("acc.", _ACCURACIES, 6, percent, lambda change: f"{change * 100:+.1f}"),
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

    def __init__(
        self,
        n_examples: int,
        epoch_size: int,
        n_done: int = 0,
        former: dict[str, float] | None = None,
        time_left: TimeLeft | None = None,
    ):
        """
        Args:
            n_examples: number of training examples at the end of the run.
            epoch_size: number of training examples in an epoch.
            n_done: number of examples trained on before this process.
            former: metrics of the last evaluation, if there has been one.
        """
        self.n_examples, self.epoch_size, self.n_done = n_examples, epoch_size, n_done
        self.former, self.columns, self.lines_since_header = former or {}, None, _HEADER_EVERY
        self.time_left = time_left or TimeLeft(n_examples)

    def train(self, means: dict[str, float]) -> list[str]:
        """Return the line for the means of the steps since the line before, with a header above it now and then."""
        examples = means["counters/examples"]
        cells = {
            "examples": f"{examples}/{self.n_examples}",
            "epoch": f"{examples / self.epoch_size:.2f}",
            "left": duration(self.time_left.seconds(examples)),
        }
        return [*self._header("train", means), self._line("train", means, cells)]

    def evaluation(self, metrics: dict[str, float]) -> list[str]:
        """Return a line, and below it the changes since the last evaluation."""
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
            + "left: time to the end, with evaluations and saves. See docs/metrics.md"
        )
        return [wrapped(text, _DIM)]

    def _line(self, split: str, metrics: dict[str, float], cells: dict[str, str], is_change: bool = False) -> str:
        are_ties = metrics.get(f"rewards_{split}/ties", 0) > 0.5 and not is_change
        for name, column in self.shown.items():
            value = metrics.get(column.key.format(split))
            if column.key == _ACCURACIES and are_ties:
                cells[name] = "ties"  # most pairs are ties, so an accuracy would mislead
            elif value is not None:
                cells[name] = (column.change if is_change else column.shown)(value)
        return "  ".join(cells.get(name, "").rjust(width) for name, width in self.columns.items()).rstrip()


# ---- samples --------------------------------------------------------------------------------------------------------


def samples_side_by_side(samples: list[dict], n_shown: int = 3, n_lines: int = 4) -> list[str]:
    """Return lines with the first samples, the policy's beside the reference's, shortened between words.

    Each prompt is shown once. `samples`: see `RunLog.log`; every model has the same prompts in the same order.
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
    """Return the first lines of a text, or the last ones (`keeps_end`), with '…' where the rest is left out."""
    text = " ".join(printable(text).split()) or "(empty)"
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
