"""Figures of several runs from judge.py's summaries: numbers computed by hand, and summaries that are refused."""

import json
import math
import re

import pytest
from test_curves import png_size

from evaluation.origins import kl_from_reference, origins
from evaluation.pairs import Origin, Response
from evaluation.statistics import mean_and_error, wilson_interval
from reporting import frontier, win_rates

DRAWN = {"run": "dpo", "checkpoint": "LATEST", "examples": 100, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def write_summary(path, origin: dict | None = None, **found) -> str:
    """Write a summary as judge.py does, with made-up numbers; leave out keys whose value is "absent"."""
    found = {"a": f"{path.stem}.jsonl", "b": "rows.jsonl", "judge": "model", "judge_model": "org/rm", "settings": "s",
             "b_digest": "d", "drawn": [DRAWN | (origin or {})], "kl": 2.0, "kl_se": 0.5, "n_kl": 10,
             **found}  # fmt: skip
    path.write_text(json.dumps({key: value for key, value in found.items() if value != "absent"}))
    return str(path)


def rate(wins: float, low: float, high: float, **more) -> dict:
    return {"win_rate": wins, "win_rate_ci95": [low, high], "n_judged": 10, **more}


def score(mean: float, error: float | None, **more) -> dict:
    return {"score": mean, "score_se": error, "n_scored": 10, "b": None, "b_digest": "absent", **more}


@pytest.fixture
def drawn_points(monkeypatch):
    """Return a dict that collects the points and error bars of a picture's lines by label, as matplotlib has them."""
    from matplotlib.figure import Figure

    read = {}
    savefig = Figure.savefig

    def look(figure, *args, **kwargs):
        (axis,) = figure.axes
        for container in axis.containers:
            line, _, bars = container
            ends = [[tuple(map(tuple, segment)) for segment in bar.get_segments()] for bar in bars]
            read[container.get_label()] = (list(zip(*map(list, line.get_data()), strict=True)), ends)
        read["labels"] = (axis.get_xlabel(), axis.get_ylabel())
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", look)
    return read


# ---- standard errors and KL -----------------------------------------------------------------------------------------


def test_standard_error_counts_prompts_not_samples():
    assert mean_and_error([1.0, 2.0, 6.0], "abc") == (3.0, pytest.approx(math.sqrt(7) / math.sqrt(3)))  # variance 14/2
    # two prompts, each of two samples that are the same: residuals -2 -2 and 2 2, sqrt(2/1 · (16 + 16)) / 4 = 2
    assert mean_and_error([1.0, 1.0, 5.0, 5.0], "aabb") == (3.0, 2.0)
    assert mean_and_error([1.0, 3.0], "aa") == (2.0, None)


def test_kl_is_the_mean_log_ratio_of_samples_from_the_policy_itself():
    origin = Origin(**DRAWN)
    responses = {(0, 0): Response("p", "x", origin, 1.0), (1, 0): Response("q", "y", origin, 3.0)}
    assert kl_from_reference(responses) == {"kl": 2.0, "kl_se": 1.0, "n_kl": 2}
    assert origins(responses) == [DRAWN]
    cold = {(0, 0): Response("p", "x", Origin(**DRAWN | {"temperature": 0.5}), 1.0)}
    assert "temperature=0.5 top_p=1 top_k=0" in kl_from_reference(cold)["kl_unknown"]
    assert origins(responses | {(2, 0): Response("r", "z")}) == []
    without = responses | {(2, 0): Response("r", "z", origin, None)}
    assert "without the reference's log-probabilities" in kl_from_reference(without)["kl_unknown"]
    empty = {(3, 0): Response("", "", origin, None)}  # nothing is drawn after an empty prompt
    assert kl_from_reference(responses | empty) == {"kl": 2.0, "kl_se": 1.0, "n_kl": 2}
    assert kl_from_reference(empty)["kl"] is None
    assert "nothing says how" in kl_from_reference({(0, None): Response("p", "x")})["kl_unknown"]


# ---- win rate against temperature -----------------------------------------------------------------------------------


def test_win_rates_are_drawn_by_checkpoint_and_temperature(tmp_path, drawn_points, capsys):
    files = [write_summary(tmp_path / f"{name}{t}.json", {"run": name, "temperature": t}, **rate(wins, low, high))
             for name, t, wins, low, high in (("sft", 1.0, 0.3, 0.2, 0.5), ("dpo", 1.0, 0.5, 0.3, 0.6),
                                              ("dpo", 0.25, 0.6, 0.4, 0.9))]  # fmt: skip
    assert win_rates.main([*files, "--output", f"{tmp_path}/w.png"]) is None
    points, (bars,) = drawn_points["dpo"]
    assert points == [(0.25, 0.6), (1.0, 0.5)]
    assert bars == [((0.25, pytest.approx(0.4)), (0.25, 0.9)), ((1.0, pytest.approx(0.3)), (1.0, 0.6))]
    assert drawn_points["sft"][0] == [(1.0, 0.3)]
    assert drawn_points["labels"] == ("sampling temperature", "win rate against rows.jsonl (judge: rm)")
    table = capsys.readouterr().out.splitlines()
    assert re.split("  +", table[1]) == ["dpo", "LATEST", "0.25", "60.0% (95 % 40.0% to 90.0%)", "10"]
    assert [line.split()[0] for line in table[:4]] == ["run", "dpo", "dpo", "sft"]
    assert table[4:] == ["", f"{tmp_path}/w.png"]
    assert png_size(tmp_path / "w.png")[0] == 900


def test_lines_are_labelled_by_checkpoint_or_by_file_name(tmp_path, drawn_points):
    files = [
        write_summary(tmp_path / "1.json", {"checkpoint": "step-50", "examples": 50}, **rate(0.5, 0.4, 0.6)),
        write_summary(tmp_path / "2.json", **rate(0.6, 0.5, 0.7)),
        write_summary(tmp_path / "base.json", {"run": None, "checkpoint": None}, **rate(0.2, 0.1, 0.4)),
    ]
    assert win_rates.main([*files, "--output", f"{tmp_path}/w.png"]) is None
    assert drawn_points.keys() - {"labels"} == {"dpo, step-50", "dpo, LATEST", "base"}


# ---- reward against KL ----------------------------------------------------------------------------------------------


def test_rewards_are_drawn_against_the_kl_of_checkpoints(tmp_path, drawn_points, capsys):
    rows = (("a", 200, 4.0, 0.5, 3.0, 0.25), ("a", 100, 1.0, 0.25, 2.0, 0.25), ("b", 100, 3.0, None, 1.0, None))
    files = [write_summary(tmp_path / f"{run}{n}.json", {"run": run, "examples": n, "checkpoint": f"step-{n}"},
                           kl=kl, kl_se=kl_error, **score(mean, error))
             for run, n, kl, kl_error, mean, error in rows]  # fmt: skip
    assert frontier.main([*files, "--output", f"{tmp_path}/f.png"]) is None
    points, (x_bars, y_bars) = drawn_points["a"]
    assert points == [(1.0, 2.0), (4.0, 3.0)]  # in the order of training
    assert x_bars[1] == ((pytest.approx(4 - 1.959964 * 0.5), 3.0), (pytest.approx(4 + 1.959964 * 0.5), 3.0))
    assert y_bars[0] == ((1.0, pytest.approx(2 - 1.959964 * 0.25)), (1.0, pytest.approx(2 + 1.959964 * 0.25)))
    assert drawn_points["b"] == ([(3.0, 1.0)], [])
    assert drawn_points["labels"] == ("KL(policy ‖ reference), nats per response", "reward: mean score of rm")
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["a", "step-100", "100", "1.000 (95 % 0.510 to 1.490)", "10", "2.000 (95 % 1.510 to 2.490)", "10"]
    assert rows[3] == ["b", "step-100", "100", "3.000", "10", "1.000", "10"]


def test_win_rates_can_be_drawn_against_kl(tmp_path, drawn_points, capsys):
    summary = write_summary(tmp_path / "1.json", **rate(0.6, 0.5, 0.8))
    assert frontier.main([summary, "--output", f"{tmp_path}/f"]) is None
    assert drawn_points["dpo"][0] == [(2.0, 0.6)]
    assert "60.0% (95 % 50.0% to 80.0%)" in capsys.readouterr().out


# ---- refused summaries ----------------------------------------------------------------------------------------------

HALF = rate(0.5, 0.4, 0.6)
COLD = DRAWN | {"temperature": 0.5}
BAD = {  # changes to the second of two files, and the message
    "several temperatures": ({"drawn": [DRAWN, COLD]}, "mixes responses of several temperatures (0.5, 1); draw them"),
    "several runs": ({"drawn": [COLD, COLD | {"run": "b"}]}, "mixes responses of several origins; draw them"),
    "no origin": ({"drawn": []}, "nothing says how the responses of 2.jsonl were drawn; draw them with sample.py"),
    "an earlier version": ({"drawn": "absent"}, "an earlier version wrote it, without saying how"),
    "nothing judged": ({"win_rate": None}, "nothing could be judged (n = 0)"),
    "another judge": ({"settings": "t"}, "has another judge or other judge settings than"),
    "another opponent": ({"b_digest": "e"}, "has other responses b than"),
    "the same point": ({}, "are both of dpo, LATEST, at temperature 1: leave one out"),
    "no summary": ({"settings": "absent"}, "no summary of judge.py; give files that it wrote"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_summary_that_cannot_be_compared_is_refused(name, tmp_path):
    change, message = BAD[name]
    first = write_summary(tmp_path / "1.json", **HALF)
    second = write_summary(tmp_path / "2.json", **HALF | change)
    error = win_rates.main([first, second, "--output", f"{tmp_path}/w.png"])
    assert message in error and second in error
    assert not (tmp_path / "w.png").exists()


def test_summaries_of_the_wrong_kind_are_refused(tmp_path):
    scores = write_summary(tmp_path / "s.json", **score(1.0, 0.1))
    assert "s.json has scores, no win rates; give judge.py a file b" in win_rates.main([scores])
    unknown = {"kl": None, "kl_unknown": "its responses were drawn with temperature=0.5 top_p=1 top_k=0"}
    cold = write_summary(tmp_path / "c.json", {"temperature": 0.5}, **HALF, **unknown)
    error = frontier.main([cold])
    assert "c.json: the KL of c.jsonl isn't known: its responses were drawn with temperature=0.5" in error
    assert "temperature=1.0 top_p=1 top_k=0" in error
    rates = write_summary(tmp_path / "b.json", {"run": "b"}, b_digest="absent", **HALF)
    assert "one has win rates, the other scores" in frontier.main([rates, scores])
    assert "nowhere.json: can't read it" in frontier.main([f"{tmp_path}/nowhere.json"])


@pytest.mark.parametrize("n", [4, 10, 51])
def test_win_rate_of_1_has_an_interval_that_ends_at_1(n, tmp_path, drawn_points):
    low, high = wilson_interval(1.0, n)
    assert high == 1.0
    assert wilson_interval(0.0, n)[0] == 0.0
    path = write_summary(tmp_path / "all_summary.json", **rate(1.0, low, high))
    assert win_rates.main([path, "--output", str(tmp_path / "w.png")]) is None


TEXTS, OTHERS = ("judge", "a", "b"), ("n_judged", "win_rate_ci95", "kl", "kl_se", "n_kl", "drawn")


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in (*TEXTS, *OTHERS) for value in (..., [1], {})] + [(key, "x") for key in OTHERS],
    ids=str,
)
def test_edited_summary_is_refused(key, value, tmp_path):
    path = write_summary(tmp_path / "s_summary.json", **rate(0.5, 0.4, 0.6))
    found = json.loads((tmp_path / "s_summary.json").read_text())
    found.pop(key, None)
    if value is not ...:
        found[key] = value
    (tmp_path / "s_summary.json").write_text(json.dumps(found))
    message = win_rates.main([path, "--output", str(tmp_path / "w.png")])
    assert message is not None and path in message
    assert not (tmp_path / "w.png").exists()


def test_picture_never_overwrites_a_summary(tmp_path):
    path = write_summary(tmp_path / "s_summary.json", **rate(0.5, 0.4, 0.6))
    assert "is also the file of summary" in win_rates.main([path, "--output", path])
    assert "no such directory" in win_rates.main([path, "--output", str(tmp_path / "no/w.png")])
