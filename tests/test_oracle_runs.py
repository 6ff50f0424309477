"""Whole runs by the command line reproduce the runs of the original repository."""

import numpy as np
import pytest
import torch
from conftest import ORACLE, figures, mark_exhaustive_except, read_jsonl

from config_checks.overrides import override_value
from preference_datasets import get_hh

RUNS = ["sft", "sft_adamw_two_epochs", "dpo", "dpo_conservative", "dpo_clipped", "dpo_reference_free", "ipo"]
SETTINGS = (
    "seed", "batch_size", "eval_batch_size", "datasets", "do_first_eval", "lr", "gradient_accumulation_steps",
    "max_grad_norm", "max_length", "max_prompt_length", "n_epochs", "n_examples", "n_eval_examples", "optimizer",
    "warmup_steps", "eval_every", "sample_during_eval",
)  # fmt: skip


def n_evaluated_once(run: dict) -> int:
    """Return the number of evaluation examples before the original repeats any.

    If the split has too few examples, the original evaluates some of them again; we evaluate each once.
    """
    data = get_hh("test", silent=True, path=str(ORACLE / "hh"))
    is_sft = run["config"]["loss"]["name"] == "sft"
    n_in_split = len(data) if is_sft else sum(len(entry["pairs"]) for entry in data.values())
    batch_size = run["config"]["eval_batch_size"]
    return min(run["config"]["n_eval_examples"], n_in_split // batch_size * batch_size)


def overrides_of(run: dict) -> list[str]:
    """Return overrides that set a recorded run's settings."""
    config = run["config"] | {"n_eval_examples": n_evaluated_once(run)}
    loss = dict(config["loss"])
    overrides = [f"{key}={override_value(config[key])}" for key in SETTINGS]
    return [*overrides, f"loss={loss.pop('name')}", *(f"loss.{key}={override_value(loss[key])}" for key in loss)]


def batch_means(microbatches: list[dict], n_examples: int | None = None) -> dict[int, dict[str, float]]:
    """Average recorded microbatches over each batch, or its first examples: {examples before: {metric: mean}}."""
    lists: dict[int, dict[str, list]] = {}
    for microbatch in microbatches:
        batch = lists.setdefault(microbatch["examples_before"], {})
        for key, values in microbatch["metrics"].items():
            batch.setdefault(key, []).extend(values)
        if "grad_norm" in microbatch:
            batch["grad_norm"] = [microbatch["grad_norm"]]
    return {
        n: {key: float(np.mean(values[:n_examples])) for key, values in batch.items()} for n, batch in lists.items()
    }


ALONE = [(name, 1, f"shared_prompt={value}") for name in RUNS for value in ("true", "false")]
ALONE += [
    *((name, 1, "padding_free=true shared_prompt=true") for name in ("dpo", "ipo")),
    *((name, 1, "padding_free=true shared_prompt=false") for name in ("dpo", "sft")),
    ("dpo", 1, "precompute_ref_log_probs=true"),
    ("dpo", 1, "model.reference_dtype=float64"),  # the reference is loaded as a second model
]
TOGETHER = [
    (name, n_workers, f"trainer={trainer} shared_prompt={shared} activation_checkpointing={checkpointing}")
    for name in ("sft", "dpo")
    for trainer, n_workers, shared, checkpointing in (
        ("FSDPTrainer", 2, "false", "false"),
        ("FSDPTrainer", 4 if name == "dpo" else 2, "auto", "true"),
        (
            "TensorParallelTrainer",
            2,
            "auto",
            "true",
        ),  # four workers, which take four times as long, are in test_parallel_runs.py
        ("TensorParallelTrainer", 2, "false", "false"),
    )
]
TOGETHER += [
    ("dpo", 4, "trainer=FSDPTrainer fsdp_replicate=2 precompute_ref_log_probs=true"),
    ("dpo", 2, "trainer=FSDPTrainer fsdp_cpu_offload=true"),
    ("dpo", 2, "trainer=FSDPTrainer padding_free=true activation_checkpointing=true"),
    ("dpo", 2, "trainer=TensorParallelTrainer precompute_ref_log_probs=true"),
]


BY_DEFAULT = [
    ("sft_adamw_two_epochs", 1, "shared_prompt=true"),
    ("dpo", 2, "trainer=FSDPTrainer padding_free=true activation_checkpointing=true"),
]


@pytest.mark.parametrize(("name", "n_workers", "variant"), mark_exhaustive_except([*ALONE, *TOGETHER], *BY_DEFAULT))
def test_run_gives_the_numbers_of_the_original(name, n_workers, variant, launcher, oracle_model, sft_archive, tmp_path):
    run = figures(f"run_{name}")
    start = [] if name == "sft" else [f"model.archive={sft_archive}"]
    overrides = [*oracle_model, *overrides_of(run), *start, *variant.split(), f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*overrides, n_workers=n_workers) == 0, launcher.output

    sft = name.startswith("sft")
    tolerance = 1e-5 if sft else 1e-3
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    batch_size = run["config"]["batch_size"]
    for split, recorded in (
        ("train", batch_means(run["microbatches"])),
        ("eval", batch_means(run["eval_microbatches"], n_evaluated_once(run))),
    ):
        ours = {line["counters/examples"]: line for line in lines if line["split"] == split}
        assert len(ours) == len(recorded) + (split == "eval")  # only we evaluate at the end
        for examples_before, expected in recorded.items():
            line = ours[examples_before + (batch_size if split == "train" else 0)]
            for key, value in expected.items():
                if name == "dpo_reference_free" and key.startswith("rewards"):
                    if key.endswith(("chosen", "rejected")):  # without a reference the reward is β log π(y|x)
                        value = run["config"]["loss"]["beta"] * expected[key.replace("rewards", "logps")]
                    else:
                        continue
                if key.endswith("accuracies") and expected[key.replace("accuracies", "margins")] == 0:
                    continue  # policy and reference are equal: which reward is larger is up to rounding
                assert line[key] == pytest.approx(value, rel=tolerance, abs=tolerance * 0.1), (examples_before, key)

    assert [line["lr"] for line in lines if line["split"] == "train"] == pytest.approx(run["lrs"], rel=1e-12)
    state = torch.load(tmp_path / "run/LATEST/policy.pt", weights_only=True)["state"]
    assert len(state) == len(run["final_weights"])
    for key, expected in run["final_weights"].items():
        weight = state["lm_head.weight" if key == "embed_out.weight" else key].double()
        assert weight.norm().item() == pytest.approx(expected["norm"], rel=tolerance), key
        # A sum whose terms cancel is only as exact as its terms. A key bias adds the same to every score of a query, so
        # its gradient after softmax is only rounding noise, which RMSprop enlarges to whole steps.
        slack = 100 if sft and key.endswith("query_key_value.bias") else 1
        assert weight.sum().item() == pytest.approx(expected["sum"], abs=slack * tolerance * weight.abs().sum().item())
