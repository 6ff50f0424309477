"""Draw win rates against sampling temperature: `python -m reporting.win_rates SUMMARY [SUMMARY ...] [--output FILE]`.

SUMMARY is a file that judge.py wrote on samples of one checkpoint at one temperature. The picture has a line for each
checkpoint, with Wilson's 95 % intervals (figures 2, right, and 3 of https://arxiv.org/abs/2305.18290); a table of
the same numbers is written beside it.
"""

if __name__ == "__main__":  # first, as the other imports take seconds
    from basics.interrupts import end_at_once

    end_at_once()

import sys

from basics.interrupts import interrupts_reported
from reporting.summaries import (
    BadSummary,
    Summary,
    command,
    draw_series,
    new_figure,
    what_is_measured,
    write,
)
from reporting.terminal import aligned


def draw(summaries: list[Summary], path: str):
    """Draw the figure and write its table.

    Raises: BadSummary if a summary has scores instead of win rates; ImportError without matplotlib.
    """
    for summary in summaries:
        if "win_rate" not in summary.found:
            raise BadSummary(f"{summary.path} has scores, no win rates; give judge.py a file b to compare with")
    summaries = sorted(summaries, key=lambda s: (s.run, s.examples, s.checkpoint or "", s.temperature))
    n_checkpoints = {s.run: len({other.series for other in summaries if other.run == s.run}) for s in summaries}
    groups: dict[str, list] = {}
    for summary in summaries:
        label = summary.run if n_checkpoints[summary.run] == 1 else f"{summary.run}, {summary.checkpoint}"
        x = (summary.temperature, None, None)
        groups.setdefault(label, []).append((summary, x, summary.value_and_interval))
    figure, axis = new_figure("sampling temperature", what_is_measured(summaries))
    draw_series(axis, groups)
    if len(ticks := sorted({summary.temperature for summary in summaries})) <= 10:
        axis.set_xticks(ticks)
    axis.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    rows = [("run", "checkpoint", "temperature", "win rate", "95 %", "pairs")]
    for summary in summaries:
        rate, low, high = summary.value_and_interval
        rows.append((summary.run, summary.checkpoint or "-", f"{summary.temperature:g}", f"{rate:.1%}",
                     f"{low:.1%} to {high:.1%}", str(summary.found["n_judged"])))  # fmt: skip
    write(figure, axis, aligned(rows), path)


main = command("win_rates", __doc__, "win_rates.png", draw)

if __name__ == "__main__":
    with interrupts_reported():
        sys.exit(main(sys.argv[1:]))
