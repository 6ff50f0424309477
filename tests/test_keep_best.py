"""`keep_best` and `stop_when_worse`: the checkpoint that BEST links to, the end of a run, and resuming."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import mark_exhaustive_except, read_jsonl
from test_cli import CHECKPOINT_FILES, TOY
from test_resume import assert_same_run

from checkpointing import best
from checkpointing.train_state import TrainState
from evaluation import sampling
from utils import UserError

# a learning rate at which the loss goes up and down
RUN = [*TOY, "loss=dpo", "sample_during_eval=false", "n_examples=64", "eval_every=8", "warmup_steps=0", "lr=3e-3"]

pytestmark = pytest.mark.slow


def evaluations(run_dir) -> dict[int, dict[str, float]]:
    lines = read_jsonl(run_dir / "metrics.jsonl")
    return {line["counters/examples"]: line for line in lines if line["split"] == "eval"}


@pytest.mark.parametrize(
    ("metric", "pick"),
    mark_exhaustive_except(
        [("loss/eval", min), ("rewards_eval/accuracies", max), ("logps_eval/rejected", min)],
        ("rewards_eval/accuracies", max),
    ),
)
def test_best_checkpoint_stays_beside_the_newest(metric, pick, launcher, tmp_path):
    run = [*RUN, f"keep_best={metric}", "keep_checkpoints=1", "save_every=64", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run) == 0, launcher.output
    values = {n: line[metric] for n, line in evaluations(tmp_path / "run").items() if n > 0}
    best_at = pick(values, key=values.get)  # the first of equals
    assert os.readlink(tmp_path / "run/BEST") == f"step-{best_at}"
    assert sorted(os.listdir(tmp_path / "run/BEST")) == CHECKPOINT_FILES
    steps = {name for name in os.listdir(tmp_path / "run") if name.startswith("step-")}
    assert f"step-{best_at}" in steps and len(steps) <= 2
    saved = torch.load(tmp_path / "run/BEST/policy.pt", weights_only=True)
    assert (saved["step_idx"], saved["metrics"][metric]) == (best_at, values[best_at])
    assert json.loads((tmp_path / "run/LATEST/state.json").read_text())["best"] == {metric: values[best_at]}


def test_stop_when_worse_ends_and_completes_the_run(launcher, tmp_path):
    run = [*RUN, "n_examples=40", "stop_when_worse=2", "keep_best=lengths_eval/chosen", f"local_run_dir={tmp_path}/run"]
    # the lengths of the data never change, so no evaluation is better than the first
    assert launcher.run(*run) == 0, launcher.output
    assert list(evaluations(tmp_path / "run")) == [0, 8, 16, 24]
    assert "Stopping early: lengths_eval/chosen was best after 8 examples" in launcher.output
    assert "worse evaluations since then: 2" in " ".join(launcher.output.split())
    state = json.loads((tmp_path / "run/LATEST/state.json").read_text())
    assert (state["complete"], state["examples"], state["worse"]) == (True, 24, 2)
    assert launcher.run(*run, "resume=auto") == 0, launcher.output
    assert "This run is complete" in launcher.output
    assert launcher.run(*run, "resume=auto", "stop_when_worse=3") == 0, launcher.output
    assert list(evaluations(tmp_path / "run")) == [0, 8, 16, 24, 32]
    assert launcher.run(*run, "resume=auto", "stop_when_worse=null") == 0, launcher.output
    assert max(evaluations(tmp_path / "run")) == 40


@pytest.mark.exhaustive
def test_best_checkpoint_and_early_stopping_survive_a_kill(launcher, tmp_path):
    run = [*RUN, "n_examples=24", "keep_best=loss/eval", "stop_when_worse=3", "keep_checkpoints=1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launcher.run(*run, f"local_run_dir={whole}") == 0, launcher.output
    launcher.start(*run, f"local_run_dir={cut}", "resume=auto")
    launcher.wait_for("wrote .*/step-8 ")
    launcher.kill(signal.SIGKILL)
    launcher.wait()
    assert launcher.run(*run, f"local_run_dir={cut}", "resume=auto") == 0, launcher.output
    assert_same_run(cut, whole)
    assert os.readlink(cut / "BEST") == os.readlink(whole / "BEST")


@pytest.mark.exhaustive
def test_best_link_is_repaired_after_a_crash_and_kept_without_keep_best(launcher, tmp_path):
    run = [*RUN, "keep_checkpoints=1", "save_every=8", f"local_run_dir={tmp_path}/run"]
    keep = "keep_best=lengths_eval/chosen"  # the lengths of the data never change: the first evaluation is the best
    assert launcher.run(*run, keep, "n_examples=16") == 0, launcher.output
    os.rename(tmp_path / "run/BEST", tmp_path / "run/BEST.replaced")
    assert launcher.run(*run, keep, "n_examples=24", "resume=auto") == 0, launcher.output
    assert os.readlink(tmp_path / "run/BEST") == "step-8"
    assert not (tmp_path / "run/BEST.replaced").is_symlink()
    os.remove(tmp_path / "run/BEST")
    assert launcher.run(*run, keep, "n_examples=32", "resume=auto") == 0, launcher.output
    assert os.readlink(tmp_path / "run/BEST") == "step-8"
    assert launcher.run(*run, "n_examples=40", "resume=auto") == 0, launcher.output
    assert sorted(name for name in os.listdir(tmp_path / "run") if name.startswith("step-")) == ["step-32", "step-8"]
    assert (tmp_path / "run/BEST/policy.pt").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("trainer", ["FSDPTrainer", "TensorParallelTrainer"])
def test_workers_agree_on_the_best_checkpoint(trainer, launcher, tmp_path):
    run = [*RUN, "n_examples=24", "keep_best=loss/eval", "stop_when_worse=1", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run, f"trainer={trainer}", n_workers=2) == 0, launcher.output
    values = {n: line["loss/eval"] for n, line in evaluations(tmp_path / "run").items() if n > 0}
    assert os.readlink(tmp_path / "run/BEST") == f"step-{min(values, key=values.get)}"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["keep_best=loss"],
            [
                "keep_best=loss: must be one of",
                "(the metrics that this run's evaluations have). Did you mean loss/eval?",
            ],
        ),
        (
            ["keep_best=kl_eval/per_token", "sample_during_eval=false"],
            ["keep_best=kl_eval/per_token: must be one of loss/eval, "],
        ),
        (["keep_best=1"], ["keep_best=1: expected a string"]),
        (["stop_when_worse=0"], ["stop_when_worse=0: must be a number above 0"]),
        (
            ["loss=sft", "keep_best=rewards_eval/accuracies"],
            ["keep_best=rewards_eval/accuracies: must be one of loss/eval, "],
        ),
    ],
)
def test_unknown_metric_for_keep_best_is_refused(overrides, parts, refusal):
    message = refusal(*TOY, "loss=dpo", *overrides)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "overrides",
    mark_exhaustive_except(
        [["loss=sft"], ["loss=dpo"], ["loss=simpo"], ["loss=dpo", "sample_during_eval=true"]],
        ["loss=sft"],
        ["loss=dpo", "sample_during_eval=true"],
    ),
    ids=str,
)
def test_keep_best_accepts_exactly_the_metrics_of_evaluations(overrides, make_trainer):
    from losses import LOSSES
    from reporting.metric_names import evaluation_metrics

    trainer = make_trainer(*TOY, "n_examples=4", "sample_during_eval=false", *overrides)
    measured = trainer.evaluate()
    if trainer.config.sample_during_eval:
        measured |= sampling.sample_evaluation(trainer)[1]
    names = {name for name in measured if not name.endswith("_se")}
    assert names == set(evaluation_metrics(LOSSES[trainer.config.loss.name], trainer.config))


def test_equal_metric_is_not_better_and_a_new_metric_starts_over(make_trainer):
    trainer = make_trainer(*TOY, "loss=dpo", "n_examples=4", "keep_best=loss/eval", "sample_during_eval=false")
    config, state = trainer.config, TrainState()
    trainer.evaluate_and_log()
    assert (trainer.state.best, trainer.state.worse) == ({}, 0)  # the evaluation before training doesn't count
    for examples, loss in ((8, 0.5), (16, 0.5), (24, 0.6)):
        state.examples, state.metrics = examples, {"loss/eval": loss, "nll_eval/chosen": 2.0}
        best.record_evaluation(state, config)
    assert (state.best, state.best_at, state.worse) == ({"loss/eval": 0.5}, 8, 2)
    config.keep_best, config.stop_when_worse = "nll_eval/chosen", 2
    assert not best.stops_early(state, config)  # no evaluation counts as worse by the new metric
    assert not best.should_save_best(state, config)
    best.record_evaluation(state, config)
    assert (state.best, state.best_at, state.worse) == ({"nll_eval/chosen": 2.0}, 24, 0)
    config.keep_best = "rewards_eval/accuracies"
    with pytest.raises(UserError, match="the evaluation lacks this metric"):
        best.record_evaluation(state, config)


@pytest.mark.exhaustive
def test_run_killed_before_the_final_latest_writes_it_on_resume(launcher, tmp_path):
    run = [*RUN, "n_examples=8", "keep_best=loss/eval", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run) == 0, launcher.output
    assert json.loads((tmp_path / "run/step-8/state.json").read_text())["complete"]
    assert os.readlink(tmp_path / "run/BEST") == "step-8"
    shutil.copytree(tmp_path / "run", tmp_path / "whole", symlinks=True)
    shutil.rmtree(tmp_path / "run/LATEST")
    (tmp_path / "run/LATEST").symlink_to("step-8")  # the final LATEST, a directory, is missing
    for message in ("Resuming from", "This run is complete"):
        assert launcher.run(*run, "resume=auto") == 0, launcher.output
        assert message in launcher.output
    assert not (tmp_path / "run/LATEST").is_symlink()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
