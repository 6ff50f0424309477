"""Read and check summaries of `judge.py`; what the commands that draw several of them share."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from basics.errors import UserError
from basics.outputs import Output, check_outputs, refuse_unless_picture
from basics.printing import printable
from reporting.curves import colors, escaped, save_figure
from reporting.intervals import mean_interval
from reporting.terminal import aligned

_REMEDY = "draw them with sample.py, each checkpoint and temperature into a new file, and run judge.py on it again"


class BadSummary(ValueError):
    """A file can't be used, alone or with the others; the message says why, and what to do."""


class Estimate(NamedTuple):
    """A number, and the bounds of its 95 % interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def shown(self, form: str) -> str:
        """Format the estimate, its numbers in a form such as '.1%'."""
        bounds = "" if self.low is None else f" (95 % {self.low:{form}} to {self.high:{form}})"
        return f"{self.value:{form}}{bounds}"


@dataclass
class Summary:
    """A summary of `judge.py` on samples of one checkpoint at one temperature."""

    path: str
    run: str
    checkpoint: str | None  # its name; None means the model as loaded
    examples: int
    temperature: float
    reward: Estimate  # the win rate, or the mean score if there is no b
    n: int  # pairs judged, or responses scored
    a: str
    b: str | None
    judge: str
    judged_by: tuple  # hash of the judge's settings, digest of b's responses: equal if summaries can be compared
    kl: Estimate | None  # from the reference, nats per response
    n_kl: int  # responses
    kl_unknown: str | None  # why there is no KL


def read_summaries(paths: list[str]) -> list[Summary]:
    """Read summaries that can be compared: of one judge, and with the same responses b, or all without b.

    Raises: BadSummary naming the file and the remedy.
    """
    summaries = [_read(path) for path in paths]
    first, places = summaries[0], {}
    for summary in summaries:
        for i, what in enumerate(("another judge or other judge settings", "other responses b")):
            if summary.judged_by[i] != first.judged_by[i]:
                raise BadSummary(
                    f"{summary.path} has {what} than {first.path}, so they can't be compared: judge both the same way"
                )
        place = (summary.run, summary.checkpoint, summary.examples, summary.temperature)
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
        raise BadSummary(f"{path}: can't read it: {error}; give files that judge.py wrote, *_summary.json") from error
    if not isinstance(found, dict) or "settings" not in found or not {"win_rate", "score"} & found.keys():
        raise BadSummary(f"{path}: no summary of judge.py; give files that it wrote, *_summary.json")
    if "drawn" not in found:
        raise BadSummary(
            f"{path}: an earlier version wrote it, without saying how the responses in a were drawn; run the same "
            "judge.py command again, its verdicts are kept"
        )
    try:
        return _parse(path, found)
    except BadSummary:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise BadSummary(f"{path}: can't use it: {what}; run the same judge.py command again") from error


def _parse(path: str, found: dict) -> Summary:
    """Return a summary read from JSON; raises an error of any kind if something is missing or of another type."""
    drawn, a = found["drawn"], _string(found["a"])
    if not drawn:
        raise BadSummary(f"{path}: nothing says how the responses of {a} were drawn; {_REMEDY}")
    if len(drawn) > 1:
        temperatures = sorted({one["temperature"] for one in drawn})
        mixed = f"temperatures ({', '.join(f'{t:g}' for t in temperatures)})" if len(temperatures) > 1 else "origins"
        raise BadSummary(f"{path}: {a} mixes responses of several {mixed}; {_REMEDY}")
    has_b = "win_rate" in found
    if found["win_rate" if has_b else "score"] is None:
        raise BadSummary(f"{path}: nothing could be judged (n = 0); run the same judge.py command again")
    if has_b:
        low, high = found["win_rate_ci95"]
        reward = Estimate(float(found["win_rate"]), float(low), float(high))
    else:
        reward = _mean(found, "score")
    (origin,), judge = drawn, _string(found["judge"])
    return Summary(
        path=path,
        run=_string(origin["run"] or os.path.splitext(os.path.basename(a))[0]),
        checkpoint=None if origin["checkpoint"] is None else _string(origin["checkpoint"]),
        examples=int(origin["examples"]),
        temperature=float(origin["temperature"]),
        reward=reward,
        n=int(found["n_judged" if has_b else "n_scored"]),
        a=a,
        b=_string(found["b"]) if has_b else None,
        judge=os.path.basename(os.path.normpath(_string(found["judge_model"] or judge))),
        judged_by=(found["settings"], found.get("b_digest")),
        kl=None if found["kl"] is None else _mean(found, "kl"),
        n_kl=int(found["n_kl"]),
        kl_unknown=found.get("kl_unknown"),
    )


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no string")
    return value


def _mean(found: dict, name: str) -> Estimate:
    mean, error = float(found[name]), found[f"{name}_se"]
    return Estimate(mean, *(mean_interval(mean, None if error is None else float(error)) or ()))


def what_is_measured(summaries: list[Summary]) -> str:
    """Return the quantity of `reward` in words.

    Raises: BadSummary if it isn't the same for all.
    """
    first = summaries[0]
    for other in summaries:
        if (other.b is None) != (first.b is None):
            raise BadSummary(f"{first.path} and {other.path}: one has win rates, the other scores; give one kind")
    if first.b is not None:
        return f"win rate against {os.path.basename(first.b)} (judge: {first.judge})"
    return f"reward: mean score of {first.judge}"


def draw_series(groups: dict[str, list[tuple[Estimate, Estimate]]], labels: tuple[str, str], path: str, shares: bool):
    """Draw a line with error bars for each group.

    If no x has an interval, groups are shifted sideways by a few points (72nds of an inch), so that bars at the same x
    don't cover each other.

    Args:
        groups: points (x, y), by label.
        labels: of the axes.
        shares: y is a share, such as a win rate: shown in percent, with a line at 50 %.

    Raises: ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.transforms import ScaledTranslation

    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    axis.set_xlabel(escaped(labels[0]))
    axis.set_ylabel(escaped(labels[1]))
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    for number, (color, (label, points)) in enumerate(zip(colors(len(groups)), groups.items(), strict=True)):
        shift = 4 * (number - (len(groups) - 1) / 2) if all(x.low is None for x, _ in points) else 0
        place = axis.transData + ScaledTranslation(shift / 72, 0, axis.figure.dpi_scale_trans)
        (x, x_bars), (y, y_bars) = map(_bars, zip(*points, strict=True))
        axis.errorbar(
            x, y, xerr=x_bars, yerr=y_bars, fmt="o-", markersize=5, color=color, linewidth=1.3, elinewidth=0.9,
            capsize=2, label=escaped(label), transform=place,
        )  # fmt: skip
        for point in points:  # the axes' limits would ignore points that are shifted
            for i in (1, 2):
                axis.update_datalim([[estimate.value if estimate[i] is None else estimate[i] for estimate in point]])
    axis.autoscale_view()
    if shares:
        axis.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def _bars(estimates: list[Estimate]) -> tuple[list[float], list[list[float]] | None]:
    """Return the values, and the lengths of their error bars below and above; None if no value has an interval."""
    values = [estimate.value for estimate in estimates]
    if all(estimate.low is None for estimate in estimates):
        return values, None
    below = [0 if low is None else value - low for value, low, _ in estimates]
    above = [0 if high is None else high - value for value, _, high in estimates]
    return values, [below, above]


def command(
    name: str, description: str, draw: Callable[[list[Summary], str], list[tuple[str, ...]]]
) -> Callable[[list[str]], str | None]:
    """Return the `main` of a module that draws a picture.

    Args:
        draw: called as `draw(summaries, path)`, it draws the picture and returns the rows of the table to print.
    """

    def main(words: list[str]) -> str | None:
        """Run the command; return an error message, or None."""
        parser = argparse.ArgumentParser(
            prog=f"python -m reporting.{name}", description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parser.add_argument("summaries", nargs="+", metavar="SUMMARY", help="a file that judge.py wrote")
        parser.add_argument(
            "--output", metavar="FILE", default=f"{name}.png", help="the picture (PNG); default: %(default)s"
        )
        args = parser.parse_args(words)
        try:
            output = Output("--output", args.output, refuse_unless_picture)
            check_outputs([output], {f"summary {path}": path for path in args.summaries})
            rows = draw(read_summaries(args.summaries), args.output)
            print(printable(f"{aligned(rows)}\n\n{args.output}"))
        except (BadSummary, UserError, OSError) as error:
            return printable(f"error: {error}")
        except ImportError as error:
            return f"error: pictures need matplotlib (pip install matplotlib): {error}"
        return None

    return main
