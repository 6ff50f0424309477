"""Draw the curves of one or several runs: `python -m reporting.curves RUN [RUN ...] [--output FILE]`.

RUN is a run or sweep directory, or a pattern. The default of FILE is `curves.png`, in the directory of a single run, or
in the current directory for several.
"""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import argparse
import os
import sys

from basics.errors import UserError
from basics.files import atomic_file
from basics.interrupts import interrupts_reported
from basics.outputs import PICTURE_OF, Output, check_outputs, refuse_unless_picture
from basics.printing import printable
from reporting.runs import NoRuns, Run, find_runs

# Okabe and Ito's colours, which the colour-blind can tell apart too; brown takes the place of their yellow
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_WIDTH, _HEIGHT, _DPI = 12, 6.6, 100  # inches: 1200 pixels
_LEGEND_CHARACTERS = 120  # in a line of the legend
# each panel's title, and its lines as (metric, style, name)
_PANELS = (
    ("loss", [("loss/{}", "-", "")]),
    ("accuracy: chosen has the larger reward", [("rewards_{}/accuracies", "-", "")]),
    ("margin of the rewards", [("rewards_{}/margins", "-", "")]),
    ("log-probability of responses (nats)", [("logps_{}/chosen", "-", "chosen"),
                                             ("logps_{}/rejected", "--", "rejected")]),
    ("gradient norm, before clipping", [("grad_norm", "-", "")]),
    ("learning rate", [("lr", "-", "")]),
)  # fmt: skip


def smoothed(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window` - 1 values before it."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0)
        means.append(total / min(i + 1, window))
    return means


def draw(runs: list[Run], path: str):
    """Write the picture, whole or not at all.

    Raises: NoRuns if no run has logged anything; ImportError without matplotlib.
    """
    runs = [run for run in runs if run.train or run.eval]
    if not runs:
        raise NoRuns("nothing has been logged yet")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (title, lines) for title, lines in _PANELS
        if any(_series(run, key, split) for run in runs for key, *_ in lines for split in ("train", "eval"))
    ]  # fmt: skip
    n_columns = 3 if len(panels) > 4 else 2
    n_rows = -(-len(panels) // n_columns)
    height = _HEIGHT * n_rows / 2 + 0.35 + 0.2 * -(-len(runs) // legend_columns(runs))  # with the legend
    with pyplot.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        figure, axes = pyplot.subplots(
            n_rows, n_columns, figsize=(_WIDTH, height), squeeze=False, layout="constrained"
        )  # fmt: skip
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, panel, runs)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_axis_off()
        _draw_legend(figure, runs)
        save_figure(figure, path)


def escaped(label: str) -> str:
    """Escape a label's dollar signs; matplotlib would read the text between two of them as mathematics."""
    return printable(label).replace("$", r"\$")


def legend_columns(runs: list[Run]) -> int:
    """Return the number of columns of the runs' legend that fit beside the other legend."""
    return max(1, _LEGEND_CHARACTERS // (max(len(run.label) for run in runs) + 6)) if len(runs) > 4 else 1


def save_figure(figure, path: str):
    """Write a figure as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot

    try:
        with atomic_file(path, binary=True) as file:
            figure.savefig(file, dpi=_DPI, format="png", metadata={"Creator": PICTURE_OF})
    finally:
        pyplot.close(figure)


def _series(run: Run, key: str, split: str) -> list[tuple[float, float]]:
    """Return (training examples, value) for each line that has the metric."""
    name = key.format(split)
    if split == "eval" and name == key:  # a metric of training only
        return []
    lines = [line for line in getattr(run, split) if name in line]
    if "accuracies" in key:  # accuracies are left out where most pairs are ties, as they would mislead
        lines = [line for line in lines if line.get(f"rewards_{split}/ties", 0) < 0.5]
    return [(line["counters/examples"], line[name]) for line in lines]


def _draw_panel(axis, panel: tuple, runs: list[Run]):
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    title, lines = panel
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("training examples")
    for run, color in zip(runs, colors(len(runs)), strict=True):
        for key, style, _ in lines:
            if points := _series(run, key, "train"):
                x, y = zip(*points, strict=True)
                if key != "lr":
                    axis.plot(x, y, style, color=color, alpha=0.2, linewidth=0.7)
                    y = smoothed(y, max(1, len(y) // 25))
                axis.plot(x, y, style, color=color, alpha=0.7, linewidth=1.1)
            if points := _series(run, key, "eval"):
                x, y = zip(*points, strict=True)
                errors = {line["counters/examples"]: 2 * line.get(f"{key.format('eval')}_se", 0) for line in run.eval}
                bars = [errors[examples] for examples in x]
                look = {"marker": "o", "markersize": 4, "color": color, "linewidth": 1.6, "elinewidth": 0.8}
                axis.errorbar(x, y, bars, fmt=style, **look)
    if len(lines) > 1:
        handles = [Line2D([], [], color="gray", linestyle=style, label=name) for _, style, name in lines]
        axis.legend(handles=handles, frameon=False)
    if "accuracies" in lines[0][0]:
        axis.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    if lines[0][0] == "lr":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.xaxis.set_major_locator(MaxNLocator(6))
    last = max(line["counters/examples"] for run in runs for line in (*run.train[-1:], *run.eval[-1:]))
    axis.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))  # the same in all panels
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if lines[0][0] == "grad_norm":
        for limit in {run.config.get("max_grad_norm") for run in runs} - {None}:
            if isinstance(limit, int | float) and limit < axis.get_ylim()[1]:
                axis.axhline(limit, color="gray", linewidth=0.8, linestyle=":")


def colors(n: int) -> list:
    """Return a colour for each of `n` runs."""
    if n <= len(COLORS):
        return list(COLORS[:n])
    from matplotlib import colormaps

    return [colormaps["viridis"](i / (n - 1) * 0.9) for i in range(n)]


def _draw_legend(figure, runs: list[Run]):
    from matplotlib.lines import Line2D

    line_styles = [
        Line2D([], [], color="gray", alpha=0.3, linewidth=0.8, label="training, each step"),
        Line2D([], [], color="gray", linewidth=1.1, label="training, smoothed"),
        Line2D([], [], color="gray", marker="o", markersize=4, linewidth=1.6, label="evaluation ± 2 standard errors"),
    ]
    run_colors = [Line2D([], [], color=c, linewidth=3, label=escaped(run.label))
                  for run, c in zip(runs, colors(len(runs)), strict=True)]  # fmt: skip
    n_columns = legend_columns(runs)
    figure.legend(handles=run_colors, loc="outside upper left", ncols=n_columns, frameon=False, fontsize=10)
    figure.legend(handles=line_styles, loc="outside upper right", ncols=3 if len(runs) == 1 else 1, frameon=False)


def main(words: list[str]) -> str | None:
    """Run the command; return an error message, or None."""
    parser = argparse.ArgumentParser(
        prog="python -m reporting.curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", metavar="FILE", help="where to write the picture (PNG)")
    args = parser.parse_args(words)
    try:
        runs = find_runs(args.runs)
        path = args.output or (os.path.join(runs[0].directory, "curves.png") if len(runs) == 1 else "curves.png")
        check_outputs([Output("--output", path, refuse_unless_picture)])
        draw(runs, path)
    except (NoRuns, UserError, OSError) as error:
        return printable(f"error: {error}")
    except ImportError as error:
        return f"error: curves need matplotlib (pip install matplotlib): {error}"
    print(printable(path))
    return None


if __name__ == "__main__":
    with interrupts_reported():
        sys.exit(main(sys.argv[1:]))
