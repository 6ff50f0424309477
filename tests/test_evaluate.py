"""`evaluate.py` repeats training's evaluation for any checkpoint, and adds intervals, groups and rows."""

import json
import math
import os
import shutil

import pytest
from conftest import REPOSITORY, mark_exhaustive_except, read_jsonl
from omegaconf import OmegaConf
from test_resume import SMALL

from commands.command_line import compose_config
from config_checks.checks import check_config
from evaluation.evaluate import _interval, _length_buckets, _record
from evaluation.statistics import wilson_interval
from reporting.metrics import mean_metrics
from trainers import make_trainer

EVALUATE = REPOSITORY / "evaluate.py"
RUN = [*SMALL, "datasets=[toy]", "n_examples=16", "loss=dpo", "sample_during_eval=false", "n_eval_examples=12"]
KINDS = {
    "dpo": [],
    "lora": ["lora={r:4}"],
    "precomputed": ["precompute_ref_log_probs=true"],
    "a moving reference": ["reference_update_every=2", "reference_update_alpha=0.5"],
    "kto": ["loss=kto"],
    "sft": ["loss=sft"],
    "FSDP": ["trainer=FSDPTrainer"],
    "TP": ["trainer=TensorParallelTrainer"],
    "both": ["trainer=FSDPTrainer", "tensor_parallel=2"],
}


def workers_of(kind: str) -> int:
    return {"FSDP": 2, "TP": 2, "both": 4}.get(kind, 1)


@pytest.fixture(scope="module")
def trained(launcher, tmp_path_factory):
    """Return a function that trains a run of one of the `KINDS`, once, and returns its directory."""
    directories = {}

    def train(kind: str):
        if kind not in directories:
            run_dir = tmp_path_factory.mktemp("runs") / kind.replace(" ", "_")
            code = launcher.run(*RUN, *KINDS[kind], f"local_run_dir={run_dir}", n_workers=workers_of(kind))
            assert code == 0, launcher.output
            directories[kind] = run_dir
        return directories[kind]

    return train


def evaluate(launcher, *overrides, n_workers: int = 1) -> str:
    code = launcher.run(*overrides, script=EVALUATE, n_workers=n_workers)
    assert code == 0, launcher.output
    return launcher.output


def figures(line: dict) -> dict:
    return {key: value for key, value in line.items() if "eval" in key and not key.endswith("_ci95")}


@pytest.mark.parametrize("kind", mark_exhaustive_except(KINDS, "dpo", "a moving reference"))
def test_evaluating_the_last_checkpoint_repeats_trainings_last_evaluation(kind, launcher, trained):
    run_dir = trained(kind)
    output = evaluate(launcher, f"run={run_dir}", n_workers=workers_of(kind))
    last = [line for line in read_jsonl(run_dir / "metrics.jsonl") if line["split"] == "eval"][-1]
    result = read_jsonl(run_dir / "evaluations.jsonl")[-1]
    assert figures(result["metrics"]) == figures(last)
    assert (result["examples"], result["updates"]) == (16, 4)
    assert f"{last['loss/eval']:.4f}" in output


def test_several_workers_compute_the_same_figures_as_one(launcher, trained):
    run_dir = trained("dpo")
    expected = [line for line in read_jsonl(run_dir / "metrics.jsonl") if line["split"] == "eval"][-1]
    output = run_dir / "FSDP.jsonl"
    words = [f"run={run_dir}", "trainer=FSDPTrainer", "world_size=2", f"output={output}"]
    assert launcher.run(*words, script=EVALUATE, forks_workers=True) == 0, launcher.output
    (result,) = read_jsonl(output)
    for key, value in figures(expected).items():
        assert result["metrics"][key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert result["n_eval_examples"] == 12


def test_rows_and_groups_add_up_to_the_means(launcher, trained):
    run_dir = trained("dpo")
    evaluate(launcher, f"run={run_dir}", f"rows={run_dir}/rows.jsonl", f"output={run_dir}/o", "n_eval_examples=40")
    rows, result = read_jsonl(run_dir / "rows.jsonl"), read_jsonl(run_dir / "o")[-1]
    assert [row["index"] for row in rows] == list(range(40))
    assert all(row["dataset"] == "toy" and row["prompt"].endswith("Assistant:") for row in rows)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    losses = [row["loss/eval"] for row in rows]
    mean = sum(losses) / 40
    assert result["metrics"]["loss/eval"] == pytest.approx(mean, rel=1e-6)
    error = math.sqrt(sum((x - mean) ** 2 for x in losses) / 39 / 40)
    low, high = result["metrics"]["loss/eval_ci95"]
    assert (low, high) == pytest.approx((mean - 1.959964 * error, mean + 1.959964 * error))
    assert result["metrics"]["loss/eval_se"] == pytest.approx(error, rel=1e-4)
    # loss = -log σ(margin)
    for row in rows:
        assert row["loss/eval"] == pytest.approx(math.log1p(math.exp(-row["rewards_eval/margins"])), rel=1e-4)
    buckets = [group for name, group in result["groups"].items() if "tokens" in name]
    assert sum(group["n"] for group in buckets) == 40
    assert result["groups"]["dataset toy"]["loss/eval"] == pytest.approx(mean)


def test_accuracy_has_a_wilson_interval():
    # 8 of 10; worked out from the formula (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10)
    assert _interval("rewards_eval/accuracies", [1.0] * 8 + [0.0] * 2) == pytest.approx([0.490162, 0.943318], abs=1e-5)
    low, high = _interval("rewards_eval/accuracies", [1.0] * 10)
    assert 0.7 < low < high == pytest.approx(1.0)


def test_checkpoint_all_evaluates_each_checkpoint_once(launcher, trained):
    run_dir = trained("lora")
    output = run_dir / "curve.jsonl"
    evaluate(launcher, f"run={run_dir}", "checkpoint=[step-8]", f"output={output}")
    assert "already evaluated" in evaluate(launcher, f"run={run_dir}", "checkpoint=all", f"output={output}")
    assert [result["examples"] for result in read_jsonl(output)] == [8, 16]
    evaluate(launcher, f"run={run_dir}", "checkpoint=all", f"output={output}", "n_eval_examples=20")
    assert [result["n_eval_examples"] for result in read_jsonl(output)] == [12, 12, 20, 20]


def test_model_without_a_run_is_evaluated(launcher, trained, tmp_path):
    run_dir = trained("dpo")
    weights = [f"model.archive={run_dir}/LATEST", f"reference_model.archive={run_dir}/step-8"]
    evaluate(launcher, *RUN, *weights, f"output={tmp_path}/o")
    output = evaluate(launcher, *RUN, *weights, f"output={tmp_path}/o")
    assert "the model as it is loaded: already evaluated; showing the figures in" in output
    (result,) = read_jsonl(tmp_path / "o")
    assert result["checkpoint"] is None
    assert result["metrics"]["rewards_eval/margins"] != 0


def test_evaluation_makes_no_optimizer(tmp_path):
    config = compose_config(*RUN, f"local_dirs=[{tmp_path}]", "wandb.enabled=false")
    OmegaConf.resolve(config)
    check_config(config)
    trainer = make_trainer(config, purpose="evaluate")
    assert trainer.optimizer is None and trainer.scheduler is None
    assert mean_metrics(trainer.evaluate_examples()[0], 12)["loss/eval"] == pytest.approx(math.log(2))


def test_data_too_small_to_train_on_is_evaluated(launcher, trained, tmp_path):
    rows = [{"prompt": f"say {n}", "chosen": f" {n}", "rejected": " no"} for n in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = evaluate(launcher, f"run={trained('dpo')}", f"datasets=[{tmp_path}/mine.jsonl]", "n_eval_examples=null")
    assert "1 evaluation example" in output


def test_evaluation_that_another_process_recorded_meanwhile_is_not_recorded_again(tmp_path):
    for key in ("a", "a", "b"):
        _record(f"{tmp_path}/e.jsonl", {"key": key, "metrics": {}})
    assert [line["key"] for line in read_jsonl(tmp_path / "e.jsonl")] == ["a", "b"]


BAD = {
    "no run": (["run=nowhere"], "run=nowhere: no run there"),
    "no checkpoint": (["run={run}", "checkpoint=step-7"], "has no such checkpoint; it has LATEST"),
    "no run and no model": ([], "no model to work on: give a run, run=RUN, or a model, model=NAME"),
    "a checkpoint without a run": (["checkpoint=step-8", *RUN], "checkpoint=step-8 requires run=DIR"),
    "rows of several": (["run={run}", "checkpoint=[step-8,LATEST]", "rows=r"], "give one checkpoint at a time"),
    "nowhere to write": (["run={run}", "output=/nowhere/o"], "output=/nowhere/o: there is no such directory"),
    "an unknown key": (["run={run}", "beta=1"], "no config key 'beta'"),
    "a sweep": (["-m", "run={run}", "seed=1,2"], "only train.py supports sweeps with -m"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_evaluation_is_refused_before_a_model_is_loaded(name, launcher, trained):
    overrides, message = BAD[name]
    run_dir = trained("dpo")
    before = sorted(os.listdir(run_dir))
    code = launcher.run(*(word.replace("{run}", str(run_dir)) for word in overrides), script=EVALUATE)
    assert code == 1, launcher.output
    assert message in launcher.output
    assert "Traceback" not in launcher.output
    assert "building policy" not in launcher.output
    assert sorted(os.listdir(run_dir)) == before


def test_damaged_checkpoint_is_refused(launcher, trained, tmp_path):
    shutil.copytree(trained("sft"), tmp_path / "run")
    with open(tmp_path / "run/LATEST/policy.pt", "r+b") as file:
        file.truncate(1000)
    assert launcher.run(f"run={tmp_path}/run", script=EVALUATE) == 1
    assert "LATEST can't be used" in launcher.output


@pytest.mark.exhaustive
def test_changed_model_or_data_is_evaluated_again(launcher, trained, tmp_path):
    rows = [{"prompt": f"say {n}", "chosen": f" {n}", "rejected": " no"} for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"datasets=[{tmp_path}/mine.jsonl]", "n_eval_examples=null", f"output={tmp_path}/o"]
    run_dir = trained("dpo")
    for archive in ("step-8", "LATEST"):
        evaluate(
            launcher, *RUN, *options, f"model.archive={run_dir}/{archive}", f"reference_model.archive={run_dir}/step-8"
        )
    first, second = read_jsonl(tmp_path / "o")
    assert first["metrics"]["rewards_eval/margins"] == 0 != second["metrics"]["rewards_eval/margins"]
    evaluate(launcher, f"run={run_dir}", *options)
    rows = [row | {"chosen": " yes"} for row in rows]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(launcher, f"run={run_dir}", *options)
    third, fourth = read_jsonl(tmp_path / "o")[2:]
    assert third["metrics"]["loss/eval"] != fourth["metrics"]["loss/eval"]


def test_sft_rows_hold_the_sft_target(launcher, trained, tmp_path):
    scored = [{"prompt": f"say {n}", "completions": [{"text": f" {n}", "score": 1}, {"text": f" best {n}", "score": 2},
              {"text": f" third {n}", "score": 0}]} for n in range(40)]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    evaluate(launcher, f"run={trained('sft')}", f"datasets=[{tmp_path}/mine.jsonl]", "n_eval_examples=null",
             f"rows={tmp_path}/rows", f"output={tmp_path}/o")  # fmt: skip
    rows = read_jsonl(tmp_path / "rows")
    assert rows
    for row in rows:
        assert row["chosen"] == f" best {row['prompt'].split()[1]}"
        assert "rejected" not in row


def test_n_eval_examples_above_the_split_size_evaluates_the_whole_split(launcher, trained, tmp_path):
    rows = tmp_path / "rows.jsonl"
    pair = {"prompt": "The story was", "chosen": " long.", "rejected": " short, and rather clever."}
    rows.write_text("".join(json.dumps(pair | {"prompt": f"Story {i} was"}) + "\n" for i in range(6)))
    common = [f"run={trained('dpo')}", f"datasets=[{rows}]", "test_fraction=0.6"]
    evaluate(launcher, *common, "eval_batch_size=2", "n_eval_examples=null", f"output={tmp_path}/all.jsonl")
    evaluate(launcher, *common, "eval_batch_size=3", "n_eval_examples=40", f"output={tmp_path}/more.jsonl")
    (whole,), (more,) = read_jsonl(tmp_path / "all.jsonl"), read_jsonl(tmp_path / "more.jsonl")
    assert more["n_eval_examples"] == whole["n_eval_examples"] < 6
    for name in ("loss/eval", "nll_eval/chosen"):
        assert more["metrics"][name] == pytest.approx(whole["metrics"][name], rel=1e-6)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], {"1 to 2": 2, "3 to 4": 2, "5 to 6": 2, "7 to 8": 2}),
        ([5, 5, 5, 5, 5, 5, 5, 9], {"5 to 9": 8}),  # all quartiles but the last are 5
        ([2, 2, 2, 2, 7, 7, 7, 7], {"2 to 6": 4, "7": 4}),
        ([3, 3, 3], {"3": 3}),
        ([4], {"4": 1}),
    ],
)
def test_length_groups_partition_the_examples(lengths, expected):
    groups = _length_buckets({i: {"lengths_eval/chosen": n} for i, n in enumerate(lengths)})
    assert {name.split(" of ")[1].removesuffix(" tokens"): len(group) for name, group in groups.items()} == expected
    assert sorted(i for group in groups.values() for i in group) == list(range(len(lengths)))


def test_equal_values_have_an_interval_of_zero_width():
    assert _interval("rewards_eval/margins", [0.0, 0.0, 0.0]) == [0, 0]
    assert _interval("rewards_eval/accuracies", [1.0, 1.0]) == wilson_interval(1.0, 2)
    assert _interval("loss/eval", [2.0]) is None
