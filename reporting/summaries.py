"""Summaries of `judge.py`, read and checked, and the parts of figures that show several of them."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

from basics.errors import UserError
from basics.files import atomic_file
from basics.outputs import Output, check_outputs, document, picture
from basics.printing import printable
from reporting.curves import colors, plain, save_figure
from reporting.intervals import mean_interval

_SUMMARY = "_summary.json"
_TABLE = document("tables", rb"run +checkpoint ")
_DRAW = "sample them with sample.py, each checkpoint and temperature into a new file, and run judge.py on it again"


class BadSummary(ValueError):
    """A file can't be used, alone or with the others; the message says why, and what to do."""


@dataclass
class Summary:
    """A summary of `judge.py`, and how its responses `a` were drawn (see `sample.py`)."""

    path: str
    found: dict
    run: str
    checkpoint: str | None
    examples: int
    temperature: float

    @property
    def series(self) -> tuple[str, str | None]:
        """Run and checkpoint."""
        return self.run, self.checkpoint

    @property
    def value_and_interval(self) -> tuple[float, float | None, float | None]:
        """The win rate, or the mean score if there is no b, and the bounds of its 95 % interval, if it has one."""
        if "win_rate" in self.found:
            return self.found["win_rate"], *self.found["win_rate_ci95"]
        return self.interval_of("score")

    def interval_of(self, name: str) -> tuple[float, float | None, float | None]:
        """Return a mean, and the bounds of its 95 % interval, if it has one."""
        mean = self.found[name]
        return mean, *(mean_interval(mean, self.found[f"{name}_se"]) or (None, None))


def read_summaries(paths: list[str]) -> list[Summary]:
    """Read summaries, which must come from one judge that compared all of them with the same responses b, or with none.

    Raises: BadSummary naming the file and the remedy.
    """
    summaries = [_read(path) for path in paths]
    for other in summaries[1:]:
        first = summaries[0]
        for key, what in (("settings", "another judge, or other settings of one,"), ("b_digest", "other responses b")):
            if other.found.get(key) != first.found.get(key):
                raise BadSummary(
                    f"{other.path} has {what} than {first.path}, so they can't be compared: judge both the same way"
                )
    places: dict[tuple, str] = {}
    for summary in summaries:
        place = (*summary.series, summary.examples, summary.temperature)
        if place in places:
            raise BadSummary(
                f"{places[place]} and {summary.path} are both of {summary.run}, {summary.checkpoint or 'its model'}, "
                f"at temperature {summary.temperature:g}: leave one out"
            )
        places[place] = summary.path
    return summaries


def _read(path: str) -> Summary:
    """Read a summary, or raise BadSummary."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BadSummary(f"{path}: can't read it: {error}; give files that judge.py wrote, *{_SUMMARY}") from error
    if not isinstance(found, dict) or "settings" not in found or not {"win_rate", "score"} & found.keys():
        raise BadSummary(f"{path}: no summary of judge.py; give files that it wrote, *{_SUMMARY}")
    if "drawn" not in found:
        raise BadSummary(
            f"{path}: it doesn't say how a was drawn, as an earlier version wrote it; run the same judge.py command "
            "again, its verdicts are kept"
        )
    if fault := _fault(found):
        raise BadSummary(f"{path}: {fault} is missing or of the wrong type; run the same judge.py command again")
    if (found["score"] if "score" in found else found["win_rate"]) is None:
        raise BadSummary(f"{path}: nothing could be judged (n = 0); run the same judge.py command again")
    if not found["drawn"]:
        raise BadSummary(f"{path}: nothing says how the responses of {found['a']} were drawn; {_DRAW}")
    if len(found["drawn"]) > 1:
        temperatures = sorted({drawn["temperature"] for drawn in found["drawn"]})
        mixed = f"temperatures ({', '.join(f'{t:g}' for t in temperatures)})" if len(temperatures) > 1 else "origins"
        raise BadSummary(f"{path}: {found['a']} mixes responses of several {mixed}; {_DRAW}")
    (drawn,) = found["drawn"]
    run = drawn["run"] or os.path.splitext(os.path.basename(found["a"]))[0]
    return Summary(path, found, run, drawn["checkpoint"], drawn["examples"], drawn["temperature"])


def _fault(found: dict) -> str | None:
    """Return the key whose value is missing or of the wrong type; None if there is none."""
    number, text, count = (int, float, type(None)), (str, type(None)), int
    kinds = {"judge": str, "a": str, "judge_model": text, "kl": number, "kl_se": number, "n_kl": count}
    if "win_rate" in found:
        kinds |= {"b": str, "win_rate": number, "n_judged": count}
        kinds |= {"win_rate_ci95": (list, type(None))}
    else:
        kinds |= {"score": number, "score_se": number, "n_scored": count}
    if found.get("kl") is None:
        kinds |= {"kl_unknown": str}
    of_drawn = {"run": text, "checkpoint": text, "examples": int, "temperature": (int, float)}
    places = [("", found, kinds)]
    if not isinstance(found["drawn"], list) or not all(isinstance(drawn, dict) for drawn in found["drawn"]):
        return "drawn"
    places += [("drawn.", drawn, of_drawn) for drawn in found["drawn"]]
    for prefix, values, expected in places:
        for key, kind in expected.items():
            value = values.get(key, ...)
            if not isinstance(value, kind) or isinstance(value, bool) or value != value:
                return prefix + key
    bounds = found.get("win_rate_ci95") or [0.0, 0.0]
    if len(bounds) != 2 or not all(isinstance(bound, int | float) for bound in bounds):
        return "win_rate_ci95"
    return None


def what_is_measured(summaries: list[Summary]) -> str:
    """Return the quantity of `value_and_interval` in words.

    Raises: BadSummary if it isn't the same for all.
    """
    first = summaries[0]
    for other in summaries:
        if ("win_rate" in other.found) != ("win_rate" in first.found):
            raise BadSummary(f"{first.path} and {other.path}: one has win rates, the other scores; give one kind")
    by = os.path.basename(os.path.normpath(str(first.found.get("judge_model") or first.found["judge"])))
    if "win_rate" in first.found:
        return f"win rate against {os.path.basename(first.found['b'])} (judge: {by})"
    return f"reward: mean score of {by}"


def new_figure(xlabel: str, ylabel: str) -> tuple:
    """Return a figure with one panel, and the panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    axis.set_xlabel(plain(xlabel))
    axis.set_ylabel(plain(ylabel))
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    return figure, axis


def draw_series(axis, groups: dict[str, list[tuple[Summary, tuple, tuple]]]):
    """Draw a line with error bars for each group.

    Groups are shifted sideways by a few points (72nds of an inch), so that bars at the same x don't cover each other.

    Args:
        groups: by label, points of (summary, x with its bounds, y with its bounds).
    """
    from matplotlib.transforms import ScaledTranslation

    for number, (color, (label, points)) in enumerate(zip(colors(len(groups)), groups.items(), strict=True)):
        shift = 4 * (number - (len(groups) - 1) / 2) if all(point[1][1] is None for point in points) else 0
        place = axis.transData + ScaledTranslation(shift / 72, 0, axis.figure.dpi_scale_trans)
        (x, x_bars), (y, y_bars) = (_bars([point[i] for point in points]) for i in (1, 2))
        axis.errorbar(
            x, y, xerr=x_bars, yerr=y_bars, fmt="o-", markersize=5, color=color, linewidth=1.3, elinewidth=0.9,
            capsize=2, label=plain(label), transform=place,
        )  # fmt: skip
        for _, *intervals in points:  # the axes' limits ignore what is shifted
            for i in (1, 2):
                axis.update_datalim([[found[0] if found[i] is None else found[i] for found in intervals]])
    axis.autoscale_view()


def _bars(values: list[tuple[float, float | None, float | None]]) -> tuple[list, list[list] | None]:
    """Return the values, and how far their intervals reach below and above them, if any has one."""
    if all(low is None for _, low, _ in values):
        return [value for value, _, _ in values], None
    below = [0 if low is None else value - low for value, low, _ in values]
    above = [0 if high is None else high - value for value, _, high in values]
    return [value for value, _, _ in values], [below, above]


def write(figure, axis, table: str, path: str):
    """Write the picture, and the table as text beside it; print the table."""
    axis.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
    text = f"{os.path.splitext(path)[0]}.txt"
    with atomic_file(text) as file:
        file.write(f"{table}\n")
    print(printable(f"{table}\n\n{path}, {text}"))


def command(name: str, description: str, output: str, work: Callable[[list[Summary], str], None]) -> Callable:
    """Return the `main` of a figure's module, which draws it by `work(summaries, path)`."""

    def main(words: list[str]) -> str | None:
        """Run the command; return an error message, or None."""
        parser = argparse.ArgumentParser(
            prog=f"python -m reporting.{name}", description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.add_argument("summaries", nargs="+", metavar="SUMMARY", help="a file that judge.py wrote")
        parser.add_argument("--output", metavar="FILE", default=output, help=f"the picture (PNG); default: {output}")
        args = parser.parse_args(words)
        if os.path.splitext(args.output)[1] == ".txt":
            return f"error: --output {args.output} is the name of its table; give the picture a name in .png"
        text = f"{os.path.splitext(args.output)[0]}.txt"
        outputs = [
            Output("--output", args.output, picture),
            Output("the table of --output", text, _TABLE),
        ]
        try:
            check_outputs(outputs, {f"summary {path}": path for path in args.summaries})
            work(read_summaries(args.summaries), args.output)
        except (BadSummary, UserError, OSError) as error:
            return printable(f"error: {error}")
        except ImportError as error:
            return f"error: pictures need matplotlib (pip install matplotlib): {error}"
        return None

    return main
