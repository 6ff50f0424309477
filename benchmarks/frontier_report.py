"""Tables and a picture of the results of `frontier.py`.

In the tables, *leaked* is the probability of all responses outside the task's grammar (`exact.Figures.outside`).
"""

import json
from pathlib import Path


def load(results: Path) -> list[dict]:
    """Load all results, in the order of their names: each run's settings and the figures of its checkpoints."""
    return [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]


def select(results: list[dict], **settings: object) -> list[dict]:
    """Return the results of runs with these settings."""
    return [r for r in results if all(r["run"][key] == value for key, value in settings.items())]


def best_checkpoint(results: list[dict]) -> dict | None:
    """Return the checkpoint with the largest fraction of the optimum's gain.

    If any checkpoint has a KL above 0.1 nats and has leaked less than 5 %, only such checkpoints count.
    """
    checkpoints = [c for r in results for c in r["checkpoints"]]
    moved = [c for c in checkpoints if c["kl"] > 0.1 and c["outside"] < 0.05] or checkpoints
    return max(moved, key=lambda c: c["fraction"], default=None)


def last_checkpoints(results: list[dict], objectives: dict[str, tuple[str, float]]) -> dict[str, list[dict]]:
    """Return, by objective, the last checkpoint at each strength, from closest to the reference to farthest.

    The baseline, SFT on the preferred responses, comes last.
    """
    common = {"optimizer": ["optimizer=SGD"], "extra": []}
    runs = {name: select(results, objective=name, data="toy", **common) for name in objectives}
    runs["sft on the preferred"] = select(results, objective="sft", **common)
    found = {}
    for name, of_objective in runs.items():
        finished = [r for r in of_objective if r["checkpoints"] and not r["error"]]
        if last := [{"strength": r["run"]["strength"], **r["checkpoints"][-1]} for r in finished]:
            found[name] = sorted(last, key=lambda checkpoint: checkpoint["kl"])
    return found


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def sweep_table(checkpoints: dict[str, list[dict]], objectives: dict[str, tuple[str, float]]) -> str:
    """Return a table of `last_checkpoints`."""
    rows = []
    for name, row in checkpoints.items():
        strengths = ", ".join(f"{end['strength']:g}" for end in row if end["strength"] is not None)
        fractions = ", ".join(f"{percent(end['fraction'])} at {end['kl']:.2f}" for end in row)
        leaks = [percent(choose(end["outside"] for end in row)) for choose in (min, max)]
        option = f"`{objectives[name][0]}` {strengths}" if name in objectives else ""
        rows.append([name, option, fractions, " to ".join(dict.fromkeys(leaks))])
    return table(["objective", "option", "fraction of the optimum's gain at the policy's KL (nats)", "leaked"], rows)


CONDITIONS = {"toy": "10,000 pairs", "toy_flipped": "20 % flipped", "toy_scarce": "300 pairs"}


def conditions_table(results: list[dict], objectives: dict[str, tuple[str, float]]) -> str:
    """Return a table of the best checkpoint at the middle strength under each condition."""
    rows = []
    for name, (_, middle) in objectives.items():
        cells = [name]
        for data in CONDITIONS:
            chosen = select(results, objective=name, data=data, strength=middle, optimizer=["optimizer=SGD"])
            best = best_checkpoint(chosen)
            cells.append(
                f"{percent(best['fraction'])} at {best['kl']:.2f}; {percent(best['outside'])}; {best['length']:.1f}"
                if best
                else ""
            )
        if any(cells[1:]):
            rows.append(cells)
    return table(["objective", *CONDITIONS.values()], rows)


def optimizer_table(results: list[dict]) -> str:
    """Return a table of the last checkpoint of each run with an optimizer other than SGD."""
    rows = []
    for result in results:
        run = result["run"]
        if run["optimizer"] != ["optimizer=SGD"] and result["checkpoints"]:
            end, words = result["checkpoints"][-1], " ".join(f"`{word}`" for word in run["optimizer"])
            figures = [percent(end["fraction"]), f"{end['kl']:.2f}", percent(end["outside"])]
            rows.append([run["objective"], words, f"{result['lr']:g}", *figures])
    return table(["loss", "optimizer", "lr", "fraction of the optimum's gain", "KL", "leaked"], rows)


def length_table(bench, results: list[dict]) -> str:
    """Return a table of the last checkpoint of each run on `toy_length`, with the policy's mean length."""
    start = bench.starts["toy_length"]
    reference = start.frontier.figures(start.reference_logps)
    rows = [["the reference", "", "", "0", percent(reference.outside), f"{reference.length:.1f}"]]
    for result in select(results, data="toy_length"):
        run, end = result["run"], (result["checkpoints"] or [None])[-1]
        if end:
            options = " ".join(f"`{word}`" for word in (f"strength {run['strength']:g}", *run["extra"]))
            figures = [percent(end["fraction"]), f"{end['kl']:.2f}", percent(end["outside"]), f"{end['length']:.1f}"]
            rows.append([run["objective"], options, *figures])
    return table(["objective", "option", "fraction of the optimum's gain", "KL", "leaked", "mean length"], rows)


GREY = "0.75"
HIGHLIGHTED = {  # the others are grey
    "dpo": "tab:blue", "ipo": "tab:green", "exo": "tab:purple", "simpo": "tab:orange", "kto": "tab:red",
    "bco": "tab:brown", "cpo": "tab:pink", "orpo": "tab:olive",
}  # fmt: skip


def draw(checkpoints: dict[str, list[dict]], path: Path):
    """Plot, for each objective, the percentage of the largest gain that it loses, against KL; 1,200 pixels wide.

    `checkpoints`: see `last_checkpoints`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 6), dpi=100)
    labels: list[tuple[float, float, str, str]] = []
    for name, row in sorted(checkpoints.items(), key=lambda item: item[0] in HIGHLIGHTED):
        kl, lost = [end["kl"] for end in row], [100 - 100 * end["fraction"] for end in row]
        colour = HIGHLIGHTED.get(name, GREY)
        axes.plot(kl, lost, "o-", color=colour, linewidth=2.2 if name in HIGHLIGHTED else 1, markersize=5)
        labels.append((kl[-1], lost[-1], name, colour))
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20], ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_ylim(20, 0.08)  # better is higher
    axes.set_xlim(0, 9.6)
    axes.set_xlabel("KL(policy || reference), nats")
    axes.set_ylabel("% of the largest gain in reward that is lost")
    axes.set_title("What each objective loses against the best policy at its KL (higher is better)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    _label(axes, labels)
    figure.savefig(path)
    plt.close(figure)


def _label(axes, labels: list[tuple[float, float, str, str]]):
    """Write each name in its colour beside its point (x, y), lowered until no other name is in the way."""
    from matplotlib.patheffects import withStroke

    taken: list[tuple[float, float]] = []
    for x, y, name, colour in labels[::-1]:
        left, height = axes.transData.transform((x, y))
        below = 0
        while any(abs(left - x) < 75 and abs(height - below - y) < 13 for x, y in taken):
            below += 4
        taken.append((left, height - below))
        # the offset is in points; a pixel has 0.72 at 100 dpi
        axes.annotate(
            name, (x, y), (7, -0.72 * below), textcoords="offset points", va="center", fontsize=9,
            color="0.45" if colour == GREY else colour, path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=10,
        )  # fmt: skip


def write_report(bench, objectives: dict[str, tuple[str, float]]) -> str:
    """Draw the picture beside the directory of results, and return the tables."""
    results = load(bench.results)
    checkpoints, start = last_checkpoints(results, objectives), bench.starts["toy"]
    draw(checkpoints, bench.out / "frontier.png")
    reference = start.frontier.figures(start.reference_logps)
    return "\n\n".join(
        [
            f"The reference: E[r] = {reference.reward:+.2f}, {percent(reference.outside)} outside the grammar.",
            sweep_table(checkpoints, objectives),
            "Best fraction of the optimum's gain at its KL; leaked; mean length (tokens):",
            conditions_table(results, objectives),
            "DPO at β = 0.5 under other optimizers, at a constant learning rate:",
            optimizer_table(results),
            "On `toy_length`:",
            length_table(bench, results),
            f"Picture: {bench.out / 'frontier.png'}",
        ]
    )
