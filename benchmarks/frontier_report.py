"""Tables and a picture of the results of `frontier.py`."""

import json
from pathlib import Path

import numpy as np


def load(results: Path) -> list[dict]:
    """Load all results, in the order of their names: each run's settings and the figures of its checkpoints."""
    return [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]


def select(results: list[dict], **settings: object) -> list[dict]:
    """Return the results of runs with these settings."""
    return [r for r in results if all(r["run"][key] == value for key, value in settings.items())]


def best_checkpoint(results: list[dict]) -> dict | None:
    """Return the checkpoint with the largest fraction of the optimum's gain.

    Only checkpoints beyond 0.1 nats that leak less than 5 % count, if there are any.
    """
    checkpoints = [c for r in results for c in r["checkpoints"]]
    moved = [c for c in checkpoints if c["kl"] > 0.1 and c["outside"] < 0.05] or checkpoints
    return max(moved, key=lambda c: c["fraction"], default=None)


def ends(results: list[dict], objective: str, data: str = "toy") -> list[dict]:
    """Return the last checkpoint at each strength of an objective, from closest to the reference to farthest."""
    chosen = select(results, objective=objective, data=data, optimizer=["optimizer=SGD"], extra=[])
    chosen = [r for r in chosen if r["checkpoints"] and not r["error"]]
    return sorted(
        ({"strength": r["run"]["strength"], **r["checkpoints"][-1]} for r in chosen), key=lambda end: end["kl"]
    )


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def sweep_table(results: list[dict], objectives: dict[str, tuple[str, float]]) -> str:
    lines = [
        "| objective | option | fraction of the optimum's gain at the policy's KL (nats) | leaked |",
        "|---|---|---|---|",
    ]
    for name, (option, _) in objectives.items():
        row = ends(results, name)
        if row:
            strengths = ", ".join(f"{end['strength']:g}" for end in row)
            fractions = ", ".join(f"{percent(end['fraction'])} at {end['kl']:.2f}" for end in row)
            leaked = f"{percent(min(e['outside'] for e in row))} to {percent(max(e['outside'] for e in row))}"
            lines.append(f"| {name} | `{option}` {strengths} | {fractions} | {leaked} |")
    for result in select(results, objective="sft"):
        end = result["checkpoints"][-1]
        fraction = f"{percent(end['fraction'])} at {end['kl']:.2f}"
        lines.append(f"| sft on the preferred | | {fraction} | {percent(end['outside'])} |")
    return "\n".join(lines)


CONDITIONS = {"toy": "10,000 pairs", "toy_flipped": "20 % flipped", "toy_scarce": "300 pairs"}


def conditions_table(results: list[dict], objectives: dict[str, tuple[str, float]]) -> str:
    """Return a table of the best checkpoint at the middle strength under each condition."""
    lines = [
        f"| objective | {' | '.join(CONDITIONS.values())} |",
        f"|---|{'---|' * len(CONDITIONS)}",
    ]
    for name, (_, middle) in objectives.items():
        if not select(results, objective=name):
            continue
        cells = []
        for data in CONDITIONS:
            chosen = select(results, objective=name, data=data, strength=middle, optimizer=["optimizer=SGD"])
            best = best_checkpoint(chosen)
            cells.append(
                f"{percent(best['fraction'])} at {best['kl']:.2f}; {percent(best['outside'])}; {best['length']:.1f}"
                if best
                else ""
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def optimizer_table(results: list[dict]) -> str:
    lines = ["| loss | optimizer | lr | fraction of the optimum's gain | KL | leaked |", "|---|---|---|---|---|---|"]
    for result in results:
        run = result["run"]
        if run["optimizer"] != ["optimizer=SGD"] and result["checkpoints"]:
            end, words = result["checkpoints"][-1], " ".join(f"`{word}`" for word in run["optimizer"])
            figures = f"{percent(end['fraction'])} | {end['kl']:.2f} | {percent(end['outside'])}"
            lines.append(f"| {run['objective']} | {words} | {result['lr']:g} | {figures} |")
    return "\n".join(lines)


def length_table(bench, results: list[dict]) -> str:
    """Return a table of the policies' mean lengths on `toy_length`, at the ends of the runs."""
    start = bench.starts["toy_length"]
    reference = start.frontier.figures(start.reference_logps)
    lines = [
        "| objective | option | fraction of the optimum's gain | KL | leaked | mean length |",
        "|---|---|---|---|---|---|",
        f"| the reference | | | 0 | {percent(reference.outside)} | {reference.length:.1f} |",
    ]
    for result in select(results, data="toy_length"):
        run, end = result["run"], (result["checkpoints"] or [None])[-1]
        if end:
            options = " ".join(f"`{word}`" for word in (f"strength {run['strength']:g}", *run["extra"]))
            figures = f"{percent(end['fraction'])} | {end['kl']:.2f} | {percent(end['outside'])} | {end['length']:.1f}"
            lines.append(f"| {run['objective']} | {options} | {figures} |")
    return "\n".join(lines)


MARKERS = "osD^vP*Xph<>dH8"


def draw(frontier, results: list[dict], objectives: dict[str, tuple[str, float]], path: Path):
    """Draw reward, and the fraction of the optimum's gain, against KL at the end of every run: 1,200 pixels wide."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curve = np.array([frontier.at(t) for t in np.geomspace(1e-3, 20, 300)])  # (300, 2) reward, KL
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), dpi=100, width_ratios=(1, 1))
    left.plot(curve[:, 1], curve[:, 0], color="black", linewidth=2, label="best possible", zorder=1)
    right.axhline(100, color="black", linewidth=2)
    colours = plt.get_cmap("tab20")
    for number, name in enumerate(objectives):
        row = ends(results, name)
        if not row:
            continue
        style = {"color": colours(number), "marker": MARKERS[number % len(MARKERS)], "markersize": 6, "linewidth": 1.2}
        left.plot([e["kl"] for e in row], [e["reward"] for e in row], linestyle="none", label=name, **style)
        right.plot([e["kl"] for e in row], [100 * e["fraction"] for e in row], label=name, **style)
    for result in select(results, objective="sft"):
        trail = result["checkpoints"]
        style = {"color": "black", "marker": "x", "markersize": 8, "linestyle": "none"}
        left.plot(trail[-1]["kl"], trail[-1]["reward"], label="SFT on the preferred", **style)
        right.plot(trail[-1]["kl"], 100 * trail[-1]["fraction"], **style)
    for axes, title in ((left, "true reward"), (right, "% of the largest gain in reward at this KL")):
        axes.set_xlim(0, 8)
        axes.set_xlabel("KL(policy || reference), nats")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    left.set_ylim(frontier.reference_reward - 0.3, 8)
    right.set_ylim(80, 100.8)
    left.legend(fontsize=8, ncols=2, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write_report(bench, objectives: dict[str, tuple[str, float]]) -> str:
    """Draw the picture into the directory of results, and return the tables."""
    results = load(bench.results)
    start = bench.starts["toy"]
    draw(start.frontier, results, objectives, bench.out / "frontier.png")
    reference = start.frontier.figures(start.reference_logps)
    return "\n\n".join(
        [
            f"The reference: E[r] = {reference.reward:+.2f}, {percent(reference.outside)} outside the grammar.",
            sweep_table(results, objectives),
            "Best fraction of the optimum's gain at its KL; leaked; mean length (tokens):",
            conditions_table(results, objectives),
            "DPO at β = 0.5 under other optimizers, at a constant learning rate:",
            optimizer_table(results),
            "On `toy_length`:",
            length_table(bench, results),
            f"Picture: {bench.out / 'frontier.png'}",
        ]
    )
