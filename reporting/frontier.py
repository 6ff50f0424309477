"""Draw reward against KL: `python -m reporting.frontier SUMMARY [SUMMARY ...] [--output FILE]`.

SUMMARY is a file that judge.py wrote on samples of one checkpoint at temperature 1, with their mean score or their win
rate. The picture has a line for each run, through its checkpoints, with 95 % intervals (figure 2, left, of
https://arxiv.org/abs/2305.18290); a table of the same numbers is written beside it. KL(policy ‖ reference) is the mean
over the samples of the policy's log-probability minus the reference's.
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

    Raises: BadSummary if a summary has no KL; ImportError without matplotlib.
    """
    for summary in summaries:
        if summary.found["kl"] is None:
            raise BadSummary(
                f"{summary.path}: the KL of {summary.found['a']} isn't known: {summary.found['kl_unknown']}. Run "
                "sample.py with temperature=1.0 top_p=1 top_k=0, from a run with a reference, and run judge.py again"
            )
    summaries = sorted(summaries, key=lambda s: (s.run, s.examples, s.checkpoint or ""))
    groups: dict[str, list] = {}
    for summary in summaries:
        groups.setdefault(summary.run, []).append((summary, summary.interval_of("kl"), summary.value_and_interval))
    what = what_is_measured(summaries)
    figure, axis = new_figure("KL(policy ‖ reference), nats per response", what)
    draw_series(axis, groups)
    if "win_rate" in summaries[0].found:
        axis.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    rows = [("run", "checkpoint", "examples", "KL (nats)", "samples", what, "n")]
    rows += [_row(summary) for summary in summaries]
    write(figure, axis, aligned(rows), path)


def _row(summary: Summary) -> tuple[str, ...]:
    found, error = summary.found, summary.found["kl_se"]
    kl = f"{found['kl']:.3f}" + (f" ± {error:.3f}" if error is not None else "")
    if "win_rate" in found:
        low, high = found["win_rate_ci95"]
        reward, n = f"{found['win_rate']:.1%} (95 % {low:.1%} to {high:.1%})", found["n_judged"]
    else:
        error = found["score_se"]
        reward = f"{found['score']:.3f}" + (f" ± {error:.3f}" if error is not None else "")
        n = found["n_scored"]
    return (summary.run, summary.checkpoint or "-", str(summary.examples), kl, str(found["n_kl"]), reward, str(n))


main = command("frontier", __doc__, "frontier.png", draw)

if __name__ == "__main__":
    with interrupts_reported():
        sys.exit(main(sys.argv[1:]))
