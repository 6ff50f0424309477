"""Draw win rates against sampling temperature: `python -m reporting.win_rates SUMMARY [SUMMARY ...] [--output FILE]`.

SUMMARY is a file that judge.py wrote on samples of one checkpoint at one temperature. The picture has a line for each
checkpoint, with Wilson's 95 % intervals (figures 2, right, and 3 of https://arxiv.org/abs/2305.18290); the same numbers
are printed as a table.
"""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import sys

from basics.interrupts import interrupts_reported
from reporting.summaries import BadSummary, Estimate, Summary, command, draw_series, what_is_measured


def draw(summaries: list[Summary], path: str) -> list[tuple[str, ...]]:
    """Draw the figure; return the rows of its table.

    Raises: BadSummary if a summary has scores instead of win rates; ImportError without matplotlib.
    """
    for summary in summaries:
        if summary.b is None:
            raise BadSummary(f"{summary.path} has scores, no win rates; give judge.py a file b to compare with")
    summaries = sorted(summaries, key=lambda s: (s.run, s.examples, s.checkpoint or "", s.temperature))
    groups: dict[str, list] = {}
    rows = [("run", "checkpoint", "temperature", "win rate", "pairs")]
    for s in summaries:
        has_others = any(other.run == s.run and other.checkpoint != s.checkpoint for other in summaries)
        label = f"{s.run}, {s.checkpoint}" if has_others else s.run
        groups.setdefault(label, []).append((Estimate(s.temperature), s.reward))
        rows.append((s.run, s.checkpoint or "-", f"{s.temperature:g}", s.reward.shown(".1%"), str(s.n)))
    draw_series(groups, ("sampling temperature", what_is_measured(summaries)), path, shares=True)
    return rows


main = command("win_rates", __doc__, draw)

if __name__ == "__main__":
    with interrupts_reported():
        sys.exit(main(sys.argv[1:]))
