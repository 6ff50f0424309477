"""Compare runs in a table: `python -m reporting.compare RUN [RUN ...]`; RUN: a run or sweep directory, or a pattern.

Each run has a row: the keys that tell it apart, its last evaluation, and its best one by the metric that sorts the
rows. Numbers are means over the evaluation examples ± their standard errors. Columns marked * can't be compared.
"""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import argparse
import csv
import io
import math
import os
import sys
from dataclasses import dataclass

from basics.interrupts import interrupts_reported
from basics.printing import markdown, printable
from reporting.metric_names import ACCURACY, KL, LOSS, MARGIN, larger_is_better
from reporting.runs import NoRuns, Run, after_training, differing_keys, distinguishing_keys, find_runs, short_values
from reporting.terminal import LOG_FILE_WIDTH, aligned, width, wrapped

METRICS = (ACCURACY, LOSS, MARGIN, "nll_eval/chosen", "logratios_eval/chosen", KL)  # shown if measured
_SHORT = {ACCURACY: "accuracy", LOSS: "loss", MARGIN: "margin", "nll_eval/chosen": "nll/token",
          "logratios_eval/chosen": "chosen log-ratio", KL: "KL/token"}  # fmt: skip
# metrics on the loss's own scale: DPO's margins grow with β, and different losses measure different things
_SCALED = ("loss/", MARGIN, "rewards_eval/chosen", "rewards_eval/rejected")
_EVALUATION_KEYS = ("datasets", "dataset_paths.", "n_eval_examples", "max_length", "max_prompt_length", "add_bos")
FORMATS = ("text", "csv", "markdown")
_LONGEST_NAME = 24  # characters of a run's directory


@dataclass
class Comparison:
    """The content of a table."""

    runs: list[Run]  # in the order of their rows
    keys: list[str]  # in which they differ
    measured: list[str]  # all metrics of their last evaluations
    metrics: list[str]  # those shown in tables
    sorted_by: str

    def incomparable(self, metric: str) -> bool:
        """True if a metric can't be compared between these runs."""
        if any(key.startswith(_EVALUATION_KEYS) for key in self.keys):
            return True
        return metric.startswith(_SCALED) and any(key.startswith("loss.") for key in self.keys)

    def heading(self, metric: str) -> str:
        """Return the heading of a metric's column."""
        return f"{_SHORT.get(metric, metric)}{'*' * self.incomparable(metric)}"

    def best(self, run: Run) -> dict[str, float]:
        """Return a run's best evaluation since training began, by the metric that sorts the rows; {} if none."""
        trained = [line for line in after_training(run.eval) if self.sorted_by in line]
        pick = max if larger_is_better(self.sorted_by) else min
        return pick(trained, key=lambda line: line[self.sorted_by], default={})

    def notes(self) -> list[str]:
        """Return the notes below the table."""
        notes = []
        if others := [key for key in self.keys if key not in distinguishing_keys(self.runs)]:
            notes.append(f"Keys that differ along with those shown: {', '.join(others)}")
        if any(key.startswith(_EVALUATION_KEYS) for key in self.keys):
            notes.append("* the runs were evaluated on different examples: none of their metrics can be compared")
        elif any(map(self.incomparable, self.metrics)):
            notes.append(
                "* on the scale of each run's own loss (DPO's margins grow with loss.beta): not to be compared between "
                "these runs; accuracy, nll, log-ratios and KL can be"
            )
        return notes


def compare(runs: list[Run], sort: str | None = None) -> Comparison:
    """Return a comparison of the runs that were evaluated after training, sorted by their best evaluation.

    Raises: NoRuns if there are none, or none has the metric `sort`.
    """
    runs = [run for run in runs if after_training(run.eval)]
    if not runs:
        raise NoRuns("none of these runs has been evaluated since it began to train")
    measured = list(dict.fromkeys(name for run in runs for name in run.eval[-1] if "/" in name))
    sort = sort or (ACCURACY if ACCURACY in measured else LOSS)
    if sort not in measured:
        raise NoRuns(f"--sort {sort}: no such metric. There are: {', '.join(measured)}")
    metrics = [name for name in dict.fromkeys((*METRICS, sort)) if name in measured]
    comparison = Comparison(runs, differing_keys(runs), measured, metrics, sort)
    worst = -math.inf if larger_is_better(sort) else math.inf  # of a run without this metric
    runs.sort(key=lambda run: comparison.best(run).get(sort, worst), reverse=larger_is_better(sort))
    return comparison


# ---- the table ------------------------------------------------------------------------------------------------------


def columns(comparison: Comparison, metrics: list[str]) -> dict[str, list[str]]:
    """Return the table's columns by their headings; of the last evaluations only these metrics."""
    runs, sort = comparison.runs, comparison.sorted_by
    table = {"run": [_cut(os.path.basename(os.path.abspath(run.directory))) for run in runs]}
    table |= {key: short_values([run.config.get(key) for run in runs]) for key in distinguishing_keys(runs)}
    table["examples"] = [str(run.eval[-1]["counters/examples"]) for run in runs]
    table |= {comparison.heading(name): [_mean_and_error(run.eval[-1], name) for run in runs] for name in metrics}
    best = [comparison.best(run) for run in runs]
    table[f"best {comparison.heading(sort)}"] = [_mean_and_error(line, sort) for line in best]
    table["at"] = [str(line.get("counters/examples", "-")) for line in best]
    return table


def _cut(name: str) -> str:
    """Shorten a directory's name to its beginning and end if it is long."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 2 - 1]}…{name[-_LONGEST_NAME // 2 :]}"


def _mean_and_error(line: dict[str, float], name: str) -> str:
    if name not in line:
        return "-"
    value, error = line[name], line.get(f"{name}_se")
    n_digits = 4 if abs(value) < 10 else 2
    return f"{value:.{n_digits}f}" + (f" ± {error:.{n_digits}f}" if error is not None else "")


def as_text(comparison: Comparison) -> str:
    """Return the table in aligned columns, as many of them as fit on a line."""
    shown, left_out = list(comparison.metrics), []
    removable = [name for name in comparison.metrics if name != comparison.sorted_by]
    while removable and _width(columns(comparison, shown)) > max(width(), LOG_FILE_WIDTH):
        shown.remove(name := removable.pop())
        left_out.insert(0, comparison.heading(name))
    notes = comparison.notes()
    if left_out:
        notes.append(f"Not shown, as the line would be too long: {', '.join(left_out)}; --format csv has them")
    return "\n".join([aligned(_rows(columns(comparison, shown))), *map(wrapped, notes)])


def as_markdown(comparison: Comparison) -> str:
    """Return the table in Markdown."""
    header, *rows = ([markdown(cell) for cell in row] for row in _rows(columns(comparison, comparison.metrics)))
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        [*(f"| {' | '.join(line)} |" for line in lines), *(f"\n{markdown(n)}" for n in comparison.notes())]
    )


def _rows(table: dict[str, list[str]]) -> list[list[str]]:
    return [list(table), *map(list, zip(*table.values(), strict=True))]


def _width(table: dict[str, list[str]]) -> int:
    """Return the table's width in characters."""
    return sum(max(map(len, (heading, *cells))) + 2 for heading, cells in table.items()) - 2


def as_csv(comparison: Comparison) -> str:
    """Return a CSV table with all differing keys and unrounded numbers.

    The columns of numbers are named `final/` or `best/` and the metric's name in metrics.jsonl.
    """
    file, measured = io.StringIO(), comparison.measured
    header = ["run", *comparison.keys, *(f"{which}/{name}" for which in ("final", "best") for name in measured)]
    writer = csv.DictWriter(file, header, lineterminator="\n")
    writer.writeheader()
    for run in comparison.runs:
        row = {"run": run.directory, **{key: run.config.get(key) for key in comparison.keys}}
        for which, line in (("final", run.eval[-1]), ("best", comparison.best(run))):
            row |= {f"{which}/{name}": line[name] for name in measured if name in line}
        writer.writerow(row)
    return file.getvalue().rstrip("\n")


def main(words: list[str]) -> str | None:
    """Run the command; return an error message, or None."""
    parser = argparse.ArgumentParser(
        prog="python -m reporting.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--sort", metavar="METRIC", help=f"default: {ACCURACY}, or {LOSS} where there is none")
    parser.add_argument("--format", choices=FORMATS, default="text")
    args = parser.parse_args(words)
    try:
        comparison = compare(find_runs(args.runs), args.sort)
    except (NoRuns, OSError) as error:
        return printable(f"error: {error}")
    print(printable({"text": as_text, "csv": as_csv, "markdown": as_markdown}[args.format](comparison)))
    return None


if __name__ == "__main__":
    with interrupts_reported():
        sys.exit(main(sys.argv[1:]))
