"""Sum up verdicts: win rates or scores with intervals, failures and cost; and format them as a table."""

import collections

from basics.printing import counted
from evaluation.pairs import Pair
from evaluation.statistics import length_controlled, mean_and_error, wilson_interval
from reporting.intervals import mean_interval


def summarize(pairs: list[Pair], lines: list[dict], options: dict) -> dict:
    """Return counts and win rates.

    A pair counts as judged if all its tasks have verdicts; if the verdicts differ, the pair is a tie.

    Args:
        lines: of a `VerdictFile`, one per task.
    """
    verdicts_of_pair: dict[tuple[int, int], list[str | None]] = {}
    for line in lines:
        verdicts_of_pair.setdefault((line["prompt_index"], line["sample"]), []).append(line["verdict"])
    outcome_of_pair = {(pair.index, pair.sample): "tie" for pair in pairs if pair.a == pair.b}
    for place, verdicts in verdicts_of_pair.items():
        if None not in verdicts:
            outcome_of_pair[place] = verdicts[0] if len(set(verdicts)) == 1 else "tie"
    judged = [pair for pair in pairs if (pair.index, pair.sample) in outcome_of_pair]
    outcomes = [outcome_of_pair[pair.index, pair.sample] for pair in judged]
    scores = [{"a": 1.0, "b": 0.0, "tie": 0.5}[outcome] for outcome in outcomes]
    counts = collections.Counter(outcomes)
    summary = {
        "n_pairs": len(pairs), "n_prompts": len({pair.index for pair in pairs}), "n_judged": len(judged),
        "n_failed": len(pairs) - len(judged), "failures": _failures(lines),
        "n_identical": len(pairs) - len(verdicts_of_pair), "wins": counts["a"], "ties": counts["tie"],
        "losses": counts["b"],
        "mean_length_a": _mean([len(pair.a) for pair in judged]),
        "mean_length_b": _mean([len(pair.b) for pair in judged]),
        "win_rate": _mean(scores), "win_rate_ci95": wilson_interval(_mean(scores), len(scores)) if scores else None,
        "length_controlled_win_rate": None, "length_controlled_win_rate_ci95": None,
    }  # fmt: skip
    if judged:
        rate, interval = length_controlled(scores, [len(pair.a) - len(pair.b) for pair in judged])
        summary |= {"length_controlled_win_rate": rate, "length_controlled_win_rate_ci95": interval}
    if options["judge"] != "model":
        summary |= _order_figures(lines, verdicts_of_pair, options["both_orders"])
    if options["judge"] == "openai":
        n_input, n_output = (sum(line[name] for line in lines) for name in ("input_tokens", "output_tokens"))
        summary |= {"input_tokens": n_input, "output_tokens": n_output, "cost": cost(n_input, n_output, options)}
    return summary


def summarize_scores(pairs: list[Pair], lines: list[dict]) -> dict:
    """Return the mean of the responses' scores, with its standard error over prompts."""
    scores = {(line["prompt_index"], line["sample"]): line["scores"][0] for line in lines if line["verdict"]}
    scored = [pair for pair in pairs if (pair.index, pair.sample) in scores]
    mean, error = mean_and_error(list(scores.values()), [index for index, _ in scores]) if scores else (None, None)
    return {
        "n_responses": len(pairs), "n_prompts": len({pair.index for pair in pairs}), "n_scored": len(scored),
        "n_failed": len(pairs) - len(scored), "failures": _failures(lines),
        "mean_length_a": _mean([len(pair.a) for pair in scored]), "score": mean, "score_se": error,
    }  # fmt: skip


def cost(n_input: int, n_output: int, options: dict) -> float | None:
    """Return the cost of the tokens sent and received; None if no price is given."""
    prices = (options["judge_input_price"], options["judge_output_price"])
    if prices == (None, None):
        return None
    return (n_input * (prices[0] or 0) + n_output * (prices[1] or 0)) / 10**6


def failures_in_words(summary: dict) -> str:
    """Return the number of failures of each kind in words: '3 timeout, 1 HTTP 400'."""
    return ", ".join(f"{count} {kind}" for kind, count in summary["failures"].items())


def _failures(lines: list[dict]) -> dict[str, int]:
    """Return how often each kind of failure occurred, the most frequent first."""
    return dict(collections.Counter(line["failure"] for line in lines if line["verdict"] is None).most_common())


def _order_figures(lines: list[dict], verdicts_of_pair: dict, both_orders: bool) -> dict:
    """Measure how much the verdicts depend on the order of the two responses."""
    first_won = [float(line["verdict"] == line["first"]) for line in lines if line["verdict"] in ("a", "b")]
    both = [verdicts for verdicts in verdicts_of_pair.values() if len(verdicts) == 2 and None not in verdicts]
    return {
        "n_decided": len(first_won), "first_wins": _mean(first_won),
        "first_wins_ci95": wilson_interval(_mean(first_won), len(first_won)) if first_won else None,
        "agreement": _mean([float(one == other) for one, other in both]) if both_orders else None,
    }  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ---- the table ------------------------------------------------------------------------------------------------------


def table(summary: dict) -> str:
    """Return the summary as it is printed."""
    lines = _table_of_scores(summary) if summary["b"] is None else _table_of_verdicts(summary)
    if summary["kl"] is not None:
        lines.append(_mean_line("KL from reference", summary, "kl", "nats per response"))
    if summary["n_failed"]:
        failed = counted(summary["n_failed"], "response" if summary["b"] is None else "pair")
        lines.append(f"  {failed} FAILED, not counted: {failures_in_words(summary)}; the same command asks again")
    if summary.get("input_tokens"):
        price = f", cost {summary['cost']:.2f}" if summary["cost"] is not None else ""
        lines.append(f"  {summary['input_tokens']:,} tokens sent, {summary['output_tokens']:,} received{price}")
    return "\n".join(lines)


def _table_of_scores(summary: dict) -> list[str]:
    lines = [f"\na: {summary['a']}"]
    n, n_prompts = counted(summary["n_scored"], "response"), counted(summary["n_prompts"], "prompt")
    lines.append(f"  {n} scored, to {n_prompts}")
    if summary["n_scored"]:
        lines.append(_mean_line("score", summary, "score", summary["judge_model"]))
        lines.append(f"  {'mean length':<20}{summary['mean_length_a']:>8.1f}   (characters)")
    return lines


def _mean_line(label: str, summary: dict, name: str, unit: str) -> str:
    mean, interval = summary[name], mean_interval(summary[name], summary[f"{name}_se"])
    shown = f"95 % {interval[0]:.4g} to {interval[1]:.4g} " if interval is not None else ""
    return f"  {label:<20}{mean:>8.4g}   {shown}({unit})"


def _table_of_verdicts(summary: dict) -> list[str]:
    lines = [f"\na: {summary['a']}\nb: {summary['b']}"]
    n, n_prompts = counted(summary["n_judged"], "pair"), counted(summary["n_prompts"], "prompt")
    outcomes = f"a wins {summary['wins']}, ties {summary['ties']}, b wins {summary['losses']}"
    lines.append(f"  {n} judged, of {n_prompts}: {outcomes}")
    rows = [("win rate of a", "win_rate"), ("at equal lengths", "length_controlled_win_rate")]
    for label, name in [*rows, ("first response wins", "first_wins")]:
        if summary.get(name) is not None:
            low, high = summary[f"{name}_ci95"]
            lines.append(f"  {label:<20}{summary[name]:>8.1%}   95 % {low:.1%} to {high:.1%}")
    if summary.get("agreement") is not None:
        lines.append(f"  {'both orders agree':<20}{summary['agreement']:>8.1%}")
    if summary["n_judged"]:
        lines.append(f"  {'mean length':<20}{summary['mean_length_a']:>8.1f}   b {summary['mean_length_b']:.1f} "
                     "(characters)")  # fmt: skip
    return lines
