"""Comparing runs: the table and its formats, columns that can't be compared, and a whole sweep."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import yaml
from conftest import read_jsonl
from test_cli import TOY

from reporting.compare import as_csv, as_markdown, as_text, compare, main
from reporting.runs import NoRuns, find_runs, short_values


def write_run(directory: Path, accuracies: list[float], kl: bool = True, **config) -> str:
    """Write a run whose evaluation before training has the best numbers, followed by these accuracies."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"local_run_dir": str(directory), **config}))
    lines = []
    for i, accuracy in enumerate([0.99, *accuracies]):
        line = {"split": "eval", "counters/examples": 100 * i, "loss/eval": 1 - accuracy, "loss/eval_se": 0.01}
        line |= {"rewards_eval/accuracies": accuracy, "rewards_eval/accuracies_se": 0.05, "rewards_eval/margins": 2.0}
        lines.append(line | ({"kl_eval/per_token": 0.1 * i} if kl else {}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(directory)


@pytest.fixture
def sweep(tmp_path) -> str:
    write_run(tmp_path / "sweep/a", [0.6, 0.8, 0.7], loss={"name": "dpo", "beta": 0.1}, lr=1e-5)
    write_run(tmp_path / "sweep/b", [0.65, 0.9], loss={"name": "dpo", "beta": 0.5}, lr=1e-5)
    write_run(tmp_path / "sweep/c", [0.7], loss={"name": "dpo", "beta": 0.9}, lr=1e-5)
    (tmp_path / "sweep/d").mkdir()  # a job that failed
    return str(tmp_path / "sweep")


def test_rows_are_sorted_by_the_best_evaluation_and_show_the_last_one_too(sweep):
    header, *rows = [line.split("  ") for line in as_text(compare(find_runs([sweep]))).splitlines()[:4]]
    rows = [[cell.strip() for cell in row if cell] for row in rows]
    assert [cell.strip() for cell in header if cell] == [
        "run", "loss.beta", "examples", "accuracy", "loss*", "margin*", "KL/token", "best accuracy", "at",
    ]  # fmt: skip
    assert rows[0] == [
        "b", "0.5", "200", "0.9000 ± 0.0500", "0.1000 ± 0.0100", "2.0000", "0.2000", "0.9000 ± 0.0500", "200",
    ]  # fmt: skip
    assert rows[1][:4] == ["a", "0.1", "300", "0.7000 ± 0.0500"]
    assert rows[1][-2:] == ["0.8000 ± 0.0500", "200"]
    assert rows[2][0] == "c"
    by_loss = compare(find_runs([sweep]), "loss/eval")
    assert [Path(run.directory).name for run in by_loss.runs] == ["b", "a", "c"]


def test_columns_that_cannot_be_compared_are_starred(sweep, tmp_path):
    text = as_text(compare(find_runs([sweep])))
    assert "loss*" in text and "margin*" in text and "accuracy*" not in text and "KL/token*" not in text
    assert "not to be compared" in text
    for lr in (1, 2):
        write_run(tmp_path / f"rates/{lr}", [0.6], loss={"name": "dpo", "beta": 0.1}, lr=lr)
    assert "*" not in as_text(compare(find_runs([f"{tmp_path}/rates"])))
    for n in (64, 128):
        write_run(tmp_path / f"data/{n}", [0.6], n_eval_examples=n)
    text = as_text(compare(find_runs([f"{tmp_path}/data"])))
    assert "accuracy*" in text and "different examples" in text


def test_only_keys_that_tell_runs_apart_have_columns(tmp_path):
    sft = "/data/runs/2026/{}/LATEST/policy.pt"
    for i, (beta, lr) in enumerate([(0.1, 1e-6), (0.1, 2e-6), (0.5, 1e-6), (0.5, 2e-6)]):
        model = {"archive": sft.format(f"sft_{beta}"), "name_or_path": "pythia"}
        write_run(tmp_path / f"r/run_{'x' * 60}_{i}", [0.6 + i / 10], loss={"name": "dpo", "beta": beta}, lr=lr,
                  model=model, seed=i)  # fmt: skip
    runs = find_runs([f"{tmp_path}/r"])
    assert [run.label for run in runs] == [f"lr={lr}, loss.beta={b}" for b in (0.1, 0.5) for lr in (1e-06, 2e-06)]
    text = as_text(compare(runs))
    assert text.splitlines()[0].split()[:4] == ["run", "lr", "loss.beta", "examples"]
    assert "Keys that differ along with those shown: model.archive, seed" in text
    assert max(map(len, text.splitlines())) <= 120
    header = as_csv(compare(runs)).splitlines()[0]
    assert {"model.archive", "seed"} <= set(header.split(","))  # the CSV has every key


def test_paths_are_shortened_to_the_parts_that_differ():
    assert short_values(["/a/b/x/LATEST/policy.pt", "/a/b/y/LATEST/policy.pt", None]) == ["x", "y", "null"]
    assert short_values(["/a/b", "/a/b/c"]) == ["b", "b/c"]
    assert short_values([True, 1e-6, "x" * 50]) == ["true", "1e-06", "…" + "x" * 39]
    assert short_values(["a/x", "b/x", "c"]) == ["a/x", "b/x", "c"]


def test_table_too_wide_for_120_characters_names_the_omitted_columns(tmp_path):
    for i in range(2):
        path = Path(write_run(tmp_path / f"r/{i}", [0.6 + i / 10], lr=i, note="y" * 39 + str(i)))
        rows = [line | {"nll_eval/chosen": 1.0, "nll_eval/chosen_se": 0.1, "logratios_eval/chosen": -1.0,
                        "rewards_eval/margins_se": 0.1} for line in read_jsonl(path / "metrics.jsonl")]  # fmt: skip
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = as_text(compare(find_runs([f"{tmp_path}/r"])))
    assert max(map(len, text.splitlines())) <= 120
    assert "Not shown, as the line would be too long: chosen log-ratio, KL/token; --format csv has them" in text


def test_csv_has_every_number_in_full_and_markdown_every_cell(sweep):
    comparison = compare(find_runs([sweep]))
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [Path(row["run"]).name for row in rows] == ["b", "a", "c"]
    assert float(rows[1]["final/rewards_eval/accuracies"]) == 0.7
    assert float(rows[1]["best/rewards_eval/accuracies"]) == 0.8
    assert float(rows[1]["final/loss/eval"]) == 1 - 0.7
    lines = as_markdown(comparison).splitlines()
    assert {line.count(" | ") for line in lines[:5]} == {8}
    assert lines[0].startswith("| run | loss.beta |") and "loss\\*" in lines[0]


def test_runs_that_cannot_be_compared_are_an_error(sweep, tmp_path, capsys):
    assert main([sweep, "--sort", "nothing/eval"]).startswith("error: --sort nothing/eval: no such metric. There are: ")
    write_run(tmp_path / "untrained/a", [])
    assert "none of these runs has been evaluated" in main([f"{tmp_path}/untrained"])
    assert main([f"{tmp_path}/nowhere"]).startswith("error: ")
    assert capsys.readouterr().out == ""
    with pytest.raises(NoRuns):
        compare([])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_sweep_with_a_failing_job_compares_the_others(launcher, tmp_path, capsys):
    """The sweep has one directory with named jobs, computes the reference once, and ends with the table."""
    run = [*TOY, "loss=dpo", "lora={r:4}", "n_examples=8", "eval_every=8", "lr=1e-2", "precompute_ref_log_probs=true"]
    sweep = ["loss.beta=0.1,0.5,-1", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert launcher.run("-m", *run, *sweep) == 1
    output = launcher.output
    names = [path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()]
    assert sorted(names) == ["loss.beta--1", "loss.beta-0.1", "loss.beta-0.5"]
    computed = [line.split()[2] for line in output.splitlines() if line.startswith("Reference log-probabilities:")]
    assert int(computed[0]) > 0 and computed[1:] == ["0"]
    assert "error: loss.beta=-1: must be" in output
    assert f"python -m reporting.compare {tmp_path}/sweep" in output
    assert main([f"{tmp_path}/sweep", "--format", "csv"]) is None
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {float(row["loss.beta"]) for row in rows} == {0.1, 0.5}
    for row in rows:
        last = read_jsonl(Path(row["run"]) / "metrics.jsonl")[-1]
        assert float(row["final/loss/eval"]) == last["loss/eval"]
        assert math.isfinite(float(row["final/kl_eval/per_token"]))
