"""Draw reward against KL: `python -m reporting.frontier SUMMARY [SUMMARY ...] [--output FILE]`.

SUMMARY is a file that judge.py wrote on samples of one checkpoint at temperature 1, with their mean score or their win
rate. The picture has a line for each run, through its checkpoints, with 95 % intervals (figure 2, left, of
https://arxiv.org/abs/2305.18290); the same numbers are printed as a table. KL(policy ‖ reference) is estimated as the
mean of the samples' log-probability under the policy minus that under the reference.
"""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import sys

from basics.interrupts import interrupts_reported
from reporting.summaries import BadSummary, Summary, command, draw_series, what_is_measured


def draw(summaries: list[Summary], path: str) -> list[tuple[str, ...]]:
    """Draw the figure; return the rows of its table.

    Raises: BadSummary if a summary has no KL; ImportError without matplotlib.
    """
    for summary in summaries:
        if summary.kl is None:
            raise BadSummary(
                f"{summary.path}: the KL of {summary.a} isn't known: {summary.kl_unknown}. Run sample.py with "
                "temperature=1.0 top_p=1 top_k=0, from a run with a reference, and run judge.py again"
            )
    summaries = sorted(summaries, key=lambda s: (s.run, s.examples, s.checkpoint or ""))
    what, are_rates = what_is_measured(summaries), summaries[0].b is not None
    groups: dict[str, list] = {}
    rows = [("run", "checkpoint", "examples", "KL (nats)", "samples", what, "n")]
    for s in summaries:
        groups.setdefault(s.run, []).append((s.kl, s.reward))
        reward = s.reward.shown(".1%" if are_rates else ".3f")
        rows.append((s.run, s.checkpoint or "-", str(s.examples), s.kl.shown(".3f"), str(s.n_kl), reward, str(s.n)))
    draw_series(groups, ("KL(policy ‖ reference), nats per response", what), path, are_rates)
    return rows


main = command("frontier", __doc__, draw)

if __name__ == "__main__":
    with interrupts_reported():
        sys.exit(main(sys.argv[1:]))
