"""Sweeps (`-m`) under Hydra's own sweeper and launcher: directories, the table, failures, signals, resuming."""

import itertools
import json
import os
import shlex
import signal
from pathlib import Path

import pytest
from conftest import mark_exhaustive_except, read_jsonl
from launcher import Run, wait_until
from test_cli import TOY

from checkpointing.stop_signal import EXIT_CODE
from commands.sweeps import _best_job
from reporting.runs import after_training, evaluations

SHORT = [*TOY, "n_examples=8", "sample_during_eval=false", "lr=1e-3", "loss=dpo"]

pytestmark = pytest.mark.slow


def table(output: str) -> list[list[str]]:
    """Return the cells of the table at a sweep's end, split at spaces."""
    lines = output[output.rindex("== The sweep in ") :].splitlines()[1:]
    return [line.split() for line in itertools.takewhile(lambda line: line and "To resume" not in line, lines)]


def printed_command(output: str) -> list[str]:
    """Return the words of the command that the sweep prints at its end."""
    return shlex.split(output.split("incomplete jobs: ")[-1].splitlines()[0])


def run_printed(launcher, directory: Path) -> Run:
    """Run the command that was printed last, as a shell would, to its end."""
    python, script, *words = printed_command(launcher.output)
    assert python == "python"
    run = launcher.start(*words, script=directory / script, directory=directory, as_typed=True)
    run.wait()
    return run


def wait_for_lines(path: Path, n: int, launcher):
    """Wait until a file has `n` whole lines."""
    wait_until(lambda: path.exists() and path.read_text().count("\n") >= n, output=lambda: launcher.output)


def files(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_sweep_has_one_directory_with_named_jobs_and_prints_a_table(launcher, tmp_path):
    code = launcher.run("-m", *SHORT, "loss.beta=0.1,0.5", "optimizer=SGD", f"hydra.sweep.dir={tmp_path}/sweep")
    assert code == 0, launcher.output
    assert sorted(os.listdir(tmp_path / "sweep")) == ["loss.beta-0.1", "loss.beta-0.5", "multirun.yaml", "sweep.jsonl"]
    header, *rows = table(launcher.output)
    assert header == ["job", "overrides", "status", "loss/eval", "rewards_eval/accuracies", "time"]
    recorded = read_jsonl(tmp_path / "sweep/sweep.jsonl")
    for row, record, beta in zip(rows, recorded, (0.1, 0.5), strict=True):
        last = read_jsonl(tmp_path / f"sweep/loss.beta-{beta}/metrics.jsonl")[-1]
        expected = [f"loss.beta-{beta}", f"loss.beta={beta}", "complete"]
        assert row[:3] == expected
        assert row[3:5] == [f"{last['loss/eval']:.4f}", f"{last['rewards_eval/accuracies']:.4f}"]
        assert [record["job"], record["overrides"], record["status"]] == expected
        assert record["loss/eval"] == last["loss/eval"]
        assert record["seconds"] > 0
    assert len({line.index(" complete ") for line in launcher.output.splitlines() if " complete " in line}) == 1

    before = files(tmp_path / "sweep/loss.beta-0.1")
    overrides = ["optimizer=SGD", f"hydra.sweep.dir={tmp_path}/sweep", "resume=auto"]
    assert launcher.run("-m", *SHORT, "loss.beta=0.1,0.5,0.2", *overrides) == 0, launcher.output
    assert files(tmp_path / "sweep/loss.beta-0.1") == before
    assert launcher.output.count("This run is complete") == 2
    assert launcher.output.count("building policy") == 1  # nothing is loaded for the complete jobs
    assert [row[2] for row in table(launcher.output)[1:]] == ["complete"] * 3


def test_best_job_is_chosen_by_accuracy_if_the_loss_varies():
    def row(overrides: str, loss: float | None, accuracy: float | None) -> dict:
        return {"overrides": overrides, "result": loss, "rewards_eval/accuracies": accuracy}

    rows = [row("loss.beta=0.1", 0.5, 0.7), row("loss.beta=0.5", 0.9, 0.8), row("loss.beta=1", None, 0.9)]
    assert _best_job(rows, "loss/eval") == (
        "Best by rewards_eval/accuracies: loss.beta=0.5 (0.8000; losses can't be compared between these jobs)"
    )
    assert _best_job([row("loss=sft", 0.5, None), row("loss=sft_tokens", 0.4, None)], "loss/eval") is None
    rows = [row("lr=1e-5", 0.5, 0.7), row("lr=1e-6", 0.9, 0.8)]
    assert _best_job(rows, "loss/eval") == "Best by loss/eval: lr=1e-5 (0.5000)"
    assert _best_job(rows[:0], "loss/eval") is None


def test_evaluation_before_training_is_left_out_of_results(tmp_path):
    lines = [{"split": "eval", "counters/examples": n, "loss/eval": loss} for n, loss in ((0, 0.69), (8, 0.5))]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert after_training(evaluations(str(tmp_path))) == []
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert after_training(evaluations(str(tmp_path))) == lines[1:]


def test_failing_job_is_reported_and_the_others_run(launcher, tmp_path):
    # 32 is refused before the model is loaded, 4096 after
    sweep = ["max_length=32,4096,64", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert launcher.run("-m", *[word for word in SHORT if "max_length" not in word], *sweep, in_order=True) == 1
    output = launcher.output
    assert "Traceback" not in output
    assert "Error executing job" not in output
    places = [output.index(text) for text in (
        "== Job 0 ", "error: max_prompt_length=32 must be below max_length=32", "== Job 1 ",
        "error: max_length=4096: the model has only 1024 positions", "== Job 2 ", "== The sweep in ",
    )]  # fmt: skip
    assert places == sorted(places)
    assert [row[2] for row in table(output)[1:]] == ["failed", "failed", "complete"]
    again = run_printed(launcher, tmp_path)
    assert again.code == 1
    assert again.output.count("This run is complete") == 1
    assert [row[2] for row in table(again.output)[1:]] == ["failed", "failed", "complete"]


@pytest.mark.exhaustive
def test_signal_ends_the_sweep_and_the_printed_command_resumes_it(launcher, tmp_path):
    overrides = [*SHORT, "n_examples=80", "loss.beta=0.1,0.2,0.3", "do_first_eval=false", "keep_checkpoints=1"]
    launcher.start("-m", *overrides, f"hydra.sweep.dir={tmp_path}/sweep")
    second = tmp_path / "sweep/loss.beta-0.2/metrics.jsonl"
    wait_for_lines(second, 6, launcher)
    launcher.kill(signal.SIGTERM)
    assert launcher.wait() == EXIT_CODE, launcher.output
    output = launcher.output
    assert "stopped by SIGTERM" in output
    assert "Traceback" not in output
    assert "Error executing job" not in output
    assert not (tmp_path / "sweep/loss.beta-0.3").exists()
    assert [row[2] for row in table(output)[1:]] == ["complete", "stopped"]
    n_lines = len(read_jsonl(second))
    assert 5 < n_lines < 20

    before = files(tmp_path / "sweep/loss.beta-0.1")
    again = run_printed(launcher, tmp_path)
    assert again.code == 0, again.output
    assert files(tmp_path / "sweep/loss.beta-0.1") == before
    assert "This run is complete" in again.output
    assert f"Resuming from {tmp_path}/sweep/loss.beta-0.2/LATEST: {4 * n_lines} examples" in again.output
    assert [row[2] for row in table(again.output)[1:]] == ["complete"] * 3
    for beta in (0.1, 0.2, 0.3):
        lines = read_jsonl(tmp_path / f"sweep/loss.beta-{beta}/metrics.jsonl")
        trained = [line["counters/examples"] for line in lines if line["split"] == "train"]
        assert trained == list(range(4, 84, 4))


@pytest.mark.exhaustive
def test_signal_while_a_job_loads_ends_the_sweep(launcher, tmp_path):
    overrides = [*SHORT, "loss.beta=0.1,0.2", "n_eval_examples=128", f"hydra.sweep.dir={tmp_path}/sweep"]
    launcher.start("-m", *overrides)
    launcher.wait_for("== Job 1 ")
    launcher.kill(signal.SIGTERM)
    assert launcher.wait() == EXIT_CODE, launcher.output
    assert [row[2] for row in table(launcher.output)[1:]] == ["complete", "stopped"]
    assert run_printed(launcher, tmp_path).code == 0


@pytest.mark.exhaustive
def test_signal_ends_a_sweep_of_jobs_with_workers(launcher, tmp_path):
    overrides = [*SHORT, "n_examples=400", "seed=1,2", "trainer=FSDPTrainer", "world_size=2"]
    launcher.start("-m", *overrides, f"hydra.sweep.dir={tmp_path}/sweep", forks_workers=True)
    first = tmp_path / "sweep/seed-1/metrics.jsonl"
    wait_for_lines(first, 4, launcher)
    launcher.kill(signal.SIGTERM)
    assert launcher.wait() == EXIT_CODE, launcher.output
    assert not (tmp_path / "sweep/seed-2").exists()
    words = printed_command(launcher.output)
    assert words[-2:] == [f"hydra.sweep.dir={tmp_path}/sweep", "resume=auto"]


@pytest.mark.exhaustive
def test_sweep_jobs_may_not_share_a_run_directory(launcher, tmp_path):
    sweep = [*SHORT, "debug=true", "n_epochs=1,2", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert launcher.run("-m", *sweep, f"local_run_dir={tmp_path}/one", in_order=True) == 1
    assert f"error: local_run_dir={tmp_path}/one: an earlier job of this sweep wrote there" in launcher.output
    assert [row[2] for row in table(launcher.output)[1:]] == ["complete", "failed"]
    assert launcher.run("-m", *sweep, f"local_run_dir='{tmp_path}/epochs_${{n_epochs}}'") == 0, launcher.output
    assert {"epochs_1", "epochs_2"} < set(os.listdir(tmp_path))


NAMES = {  # overrides of a sweep: the directories of its jobs
    "adapters": (["lora.r=4,8"], ["lora.r-4", "lora.r-8"]),
    "lists and dicts": (["optimizer_args={momentum:0.1},{}"], ["optimizer_args-_", "optimizer_args-_momentum_0.1_"]),
    "choices": (["loss=dpo", "loss.beta=choice(0.1,0.2)"], ["loss.beta-0.1", "loss.beta-0.2"]),
    "groups": (["loss=dpo,ipo"], ["loss-dpo", "loss-ipo"]),
    "nothing varied": ([], ["job_0"]),
    "long values": ([f"model.archive={'x' * 200},{'y' * 200}"], None),
    "slashes, spaces and letters": (["model.archive='a b/c','é'"], ["model.archive-_a_b_c_", "model.archive-_é_"]),
}


@pytest.mark.parametrize(
    "name", mark_exhaustive_except(NAMES, "lists and dicts", "long values", "slashes, spaces and letters")
)
def test_job_directories_have_typable_names(name, launcher, tmp_path):
    overrides, expected = NAMES[name]
    # batch_size=0 is refused before any job runs
    assert launcher.run("-m", *TOY, "batch_size=0", *overrides, f"hydra.sweep.dir={tmp_path}/sweep") == 1
    names = [row["job"] for row in read_jsonl(tmp_path / "sweep/sweep.jsonl")]
    if expected is None:
        assert [len(name) for name in names] == [159, 159]
        assert len(set(names)) == 2
    else:
        assert sorted(names) == sorted(expected)


def test_sweep_from_a_config_names_its_jobs(launcher, tmp_path):
    (tmp_path / "conf/own").mkdir(parents=True)
    text = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\n"
    (tmp_path / "conf/own/seeds.yaml").write_text(text)
    options = ["-m", f"--config-dir={tmp_path}/conf"]
    assert launcher.run(*options, *TOY, "+own=seeds", "batch_size=0", f"hydra.sweep.dir={tmp_path}/sweep") == 1
    assert [row["job"] for row in read_jsonl(tmp_path / "sweep/sweep.jsonl")] == ["seed-1", "seed-2"], launcher.output


def test_sweep_refuses_resume_of_one_run(launcher, tmp_path):
    assert launcher.run("-m", *SHORT, "seed=1,2", f"resume={tmp_path}", f"hydra.sweep.dir={tmp_path}/sweep") == 1
    assert "a sweep resumes all its jobs by resume=auto and hydra.sweep.dir=DIR" in launcher.output


@pytest.mark.exhaustive
def test_printed_resume_command_quotes_the_run_directory(launcher, tmp_path):
    run_dir = tmp_path / "it's a=b"
    typed = str(run_dir).replace("'", "\\'")
    overrides = [word for word in SHORT if not word.startswith("n_examples")]
    launcher.start(*overrides, "n_examples=4000", "do_first_eval=false", f"local_run_dir='{typed}'")
    wait_for_lines(run_dir / "metrics.jsonl", 1, launcher)
    launcher.kill(signal.SIGTERM)
    assert launcher.wait() == EXIT_CODE, launcher.output
    command = shlex.split(launcher.output.strip().splitlines()[-1].split("resume from it: ")[1])
    examples = json.loads((run_dir / "LATEST/state.json").read_text())["examples"]
    assert launcher.run(*command[2:], f"n_examples={examples + 4}") == 0, launcher.output
    assert f"Resuming from {run_dir}/LATEST: {examples} examples" in launcher.output


def test_help_and_cfg_print_what_hydra_prints(train_ok):
    assert "== Config ==" in train_ok("--help")
    shown = train_ok("--cfg", "job", "model=tiny", "loss=dpo")
    assert "beta: 0.1" in shown
    assert "${get_local_run_dir:" in shown
    assert "dir: ${get_local_dir:${local_dirs}}/sweep_" in train_ok("--cfg", "hydra")
    assert "/sft_tiny_20" in train_ok("--cfg", "job", "--resolve", "model=tiny")
    train_ok("--cfg", "all", "--resolve", "model=tiny")
    assert "hydra_bash_completion" in train_ok("--shell-completion", "install=bash")


def test_tab_completion_knows_keys_and_groups(launcher):
    env = {"COMP_LINE": "python train.py loss=", "COMP_POINT": "21"}
    assert launcher.run("-sc", "query=bash", env=env, as_typed=True) == 0, launcher.output
    assert {"loss=dpo", "loss=ipo", "loss=sft"} <= set(launcher.output.split())


def test_second_sweep_in_the_same_directory_is_refused_while_the_first_runs(launcher, tmp_path):
    sweep = ["-m", *SHORT, f"hydra.sweep.dir={tmp_path}/sweep", "loss.beta=0.1,0.2"]
    first = launcher.start(*sweep, "n_examples=4000")
    wait_until(lambda: "Job 0" in first.output, output=lambda: first.output)
    assert launcher.run(*sweep, "seed=7") == 1
    assert f"error: hydra.sweep.dir={tmp_path}/sweep: another sweep is running there: process" in launcher.output
    assert "Traceback" not in launcher.output
    first.kill(signal.SIGTERM)
    assert first.wait() == EXIT_CODE, first.output
    assert ".lock" not in os.listdir(tmp_path / "sweep")
