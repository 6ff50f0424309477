"""Sweeps under other launchers and sweepers of Hydra (joblib, submitit, optuna), whose jobs run in other processes."""

import multiprocessing
import signal
from pathlib import Path

import pytest
import yaml
from conftest import read_jsonl
from launcher import wait_until
from test_sweeps import SHORT, run_printed, table

from checkpointing.stop_signal import EXIT_CODE
from commands.sweeps import SweepLog

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "trainer"), [("joblib", "BasicTrainer"), ("submitit", "FSDPTrainer")])
def test_jobs_of_a_launcher_are_named_recorded_and_printed(name, trainer, launcher, tmp_path):
    words = [word for word in SHORT if "max_length=" not in word] + [f"trainer={trainer}"]
    words += ["world_size=2"] if trainer == "FSDPTrainer" else []
    sweep = ["-m", *words, "max_length=64,32", *LAUNCHERS[name], f"hydra.sweep.dir={tmp_path}/sweep"]
    assert launcher.run(*sweep) == 1, launcher.output
    failed, complete = sorted(row[:3] for row in table(launcher.output)[1:])
    assert failed == ["max_length-32", "max_length=32", "failed"]
    assert complete == ["max_length-64", "max_length=64", "complete"]
    assert "max_length=32: error: max_prompt_length=32 must be below max_length=32" in launcher.output
    assert "Traceback" not in launcher.output
    last = read_jsonl(tmp_path / "sweep/max_length-64/metrics.jsonl")[-1]
    assert f"Best by loss/eval: max_length=64 ({last['loss/eval']:.4f})" in launcher.output
    results = {row["overrides"]: row["result"] for row in read_jsonl(tmp_path / "sweep/sweep.jsonl")}
    assert results == {"max_length=64": last["loss/eval"], "max_length=32": None}


@pytest.mark.exhaustive
def test_signal_stops_the_jobs_of_a_pool_and_the_printed_command_resumes_them(launcher, tmp_path):
    overrides = ["-m", *SHORT, "loss.beta=0.1,0.2,0.3", *LAUNCHERS["joblib"], f"hydra.sweep.dir={tmp_path}/sweep"]
    launcher.start(*[word.replace("n_examples=8", "n_examples=100") for word in overrides])
    logs = [tmp_path / f"sweep/loss.beta-{beta}/metrics.jsonl" for beta in (0.1, 0.2)]
    wait_until(lambda: all(log.exists() and log.read_text().count("\n") >= 4 for log in logs))
    launcher.kill(signal.SIGTERM)
    assert launcher.wait() == EXIT_CODE, launcher.output
    assert [row[2] for row in table(launcher.output)[1:]] == ["stopped", "stopped"]
    assert not (tmp_path / "sweep/loss.beta-0.3").exists()
    again = run_printed(launcher, tmp_path)
    assert again.code == 0, again.output
    assert again.output.count("Resuming from") == 2
    assert [row[2] for row in table(again.output)[1:]] == ["complete"] * 3


OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1"]


@pytest.mark.exhaustive
def test_optuna_minimizes_the_loss_and_gets_the_result_of_a_repeated_trial(launcher, tmp_path):
    overrides = ["loss.beta=choice(0.1,0.5)", *OPTUNA, "hydra.sweeper.n_trials=4", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert launcher.run("-m", *SHORT, *overrides) == 0, launcher.output
    rows = read_jsonl(tmp_path / "sweep/sweep.jsonl")
    assert [row["status"] for row in rows] == ["complete"] * 4
    assert launcher.output.count("This run is complete") == 2
    assert launcher.output.count("building policy") == 2
    results = {row["overrides"]: row["result"] for row in rows}
    assert [row["result"] for row in rows] == [results[row["overrides"]] for row in rows]
    best = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert best["best_value"] == min(results.values())
    assert f"loss.beta={best['best_params']['loss.beta']}" == min(results, key=results.get)


@pytest.mark.exhaustive
def test_optuna_maximizes_the_metric_that_keep_best_names(launcher, tmp_path):
    words = [
        "-m",
        *SHORT,
        "n_examples=16",
        "eval_every=4",
        "loss.beta=0.1,0.2",
        "keep_best=rewards_eval/accuracies",
        *OPTUNA,
    ]
    words += ["hydra.sweeper.n_trials=1", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert launcher.run(*words) == 1
    assert "error: hydra.sweeper.direction=minimize: a job returns rewards_eval/accuracies" in launcher.output
    assert "Traceback" not in launcher.output
    assert launcher.run(*words, "hydra.sweeper.direction=maximize") == 0, launcher.output
    (row,) = read_jsonl(tmp_path / "sweep/sweep.jsonl")
    log = read_jsonl(Path(row["local_run_dir"]) / "metrics.jsonl")
    accuracies = [line["rewards_eval/accuracies"] for line in log if line["split"] == "eval"]
    assert row["result"] == max(accuracies[1:])  # without the evaluation before training
    assert yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())["best_value"] == row["result"]


@pytest.mark.exhaustive
def test_failed_trial_is_reported_and_optuna_chooses_among_the_others(launcher, tmp_path):
    overrides = ["max_length=choice(32,64)", *OPTUNA, "hydra.sweeper.n_trials=4", "hydra.sweeper.max_failure_rate=1"]
    words = [word for word in SHORT if "max_length=" not in word]
    assert launcher.run("-m", *words, *overrides, f"hydra.sweep.dir={tmp_path}/sweep") == 1
    assert {row[2] for row in table(launcher.output)[1:]} == {"complete", "failed"}
    best = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert best["best_params"] == {"max_length": 64}


def add_rows(log: SweepLog, name: str):
    for number in range(50):
        log.add({"overrides": f"{name}={number}", "seconds": 1.0, "text": "x" * 5000})


def test_jobs_that_end_at_the_same_time_are_all_recorded(tmp_path):
    log = SweepLog(str(tmp_path))
    processes = [multiprocessing.get_context("fork").Process(target=add_rows, args=(log, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(read_jsonl(tmp_path / "sweep.jsonl")) == len(log.rows()) == 150
    log.add({"overrides": "a=0", "seconds": 2.0})
    assert log.rows()["a=0"]["seconds"] == 3.0
