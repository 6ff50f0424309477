"""Runs share a cached reference only if they would compute the same log-probabilities."""

import itertools
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from acceleration.reference_cache import open_cache

TOY = [
    "model=tiny", "datasets=[toy]", "n_examples=4", "n_eval_examples=4", "eval_batch_size=4", "max_length=64",
    "max_prompt_length=32", "sample_during_eval=false", "loss=dpo", "model.reference_dtype=float32",
]  # fmt: skip
PRECOMPUTED = [*TOY, "precompute_ref_log_probs=true"]
N_PAIRS = 8


@pytest.fixture
def archives(make_trainer, tmp_path) -> dict[str, str]:
    """Save weights in float32 ("exact") and rounded to bfloat16 ("rounded"); return the override for each."""
    make_trainer(*TOY).policy.save_pretrained(tmp_path / "exact")
    path = tmp_path / "exact/model.safetensors"
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(path).items()}
    save_file(rounded, tmp_path / "rounded.safetensors", metadata={"format": "pt"})
    return {"exact": f"model.archive={path}", "rounded": f"model.archive={tmp_path}/rounded.safetensors"}


@pytest.fixture
def precompute(make_trainer, capsys):
    """Return a function that runs the reference pass.

    It returns the trainer, the number of pairs computed, and True if a model was loaded.
    """

    def run(*overrides: str):
        capsys.readouterr()
        trainer = make_trainer(*PRECOMPUTED, *overrides)
        output = capsys.readouterr().out
        return trainer, int(re.search(r"(\d+) computed", output)[1]), "building reference model" in output

    return run


def logps(trainer) -> torch.Tensor:
    return torch.stack(trainer.reference_logps(trainer.eval_batches[0])).double()


def test_cache_of_another_precision_is_not_used(precompute, make_trainer):
    """The reference is computed as the policy is: in float32, under autocast, in bfloat16; or in a dtype of its own."""
    precisions = [
        ["model.reference_dtype=null"],
        ["model.reference_dtype=null", "model.policy_mp=bfloat16"],
        ["model.reference_dtype=null", "model.policy_dtype=bfloat16"],
        ["model.reference_dtype=bfloat16", "model.policy_mp=bfloat16"],
    ]
    values = []
    for overrides in precisions:
        trainer, n_computed, was_loaded = precompute(*overrides)
        assert (n_computed, was_loaded) == (N_PAIRS, "reference_dtype=bfloat16" in overrides[0]), overrides
        values.append(logps(trainer))
        online = logps(make_trainer(*TOY, *overrides))
        torch.testing.assert_close(values[-1], online, rtol=0, atol=0)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(values[:3], 2))
    # uses the cache of precisions[0]
    assert precompute("model.reference_dtype=float32", "model.policy_mp=bfloat16")[1] == 0


@pytest.mark.exhaustive
def test_archives_that_differ_only_in_float32_have_separate_caches(precompute, archives):
    """A bfloat16 policy can't tell the two archives apart; a float32 reference can."""
    overrides = ["model.policy_dtype=bfloat16"]
    exact, n_computed, _ = precompute(*overrides, archives["exact"])
    assert n_computed == N_PAIRS
    rounded, n_computed, _ = precompute(*overrides, archives["rounded"])
    assert n_computed == N_PAIRS
    assert not torch.equal(logps(exact), logps(rounded))


def test_cache_does_not_depend_on_the_policys_dtype_or_adapter(precompute, archives):
    """Weights are hashed from the policy if possible; otherwise the reference is loaded."""
    expected, n_computed, was_loaded = precompute(archives["exact"])
    assert (n_computed, was_loaded) == (N_PAIRS, False)
    for overrides, is_loaded in (
        (["model.policy_dtype=bfloat16"], True),
        (["model.policy_mp=bfloat16"], False),
        (["lora={r:4,init_lora_weights:pissa}"], True),  # PiSSA changes the policy's base
    ):
        trainer, n_computed, was_loaded = precompute(archives["exact"], *overrides)
        assert (n_computed, was_loaded) == (0, is_loaded), overrides
        torch.testing.assert_close(logps(trainer), logps(expected), rtol=0, atol=0)


def test_float16_reference_is_not_loaded_when_fully_cached(precompute):
    assert precompute("model.reference_dtype=float16")[1:] == (N_PAIRS, True)
    assert precompute("model.reference_dtype=float16")[1:] == (0, False)


def test_mixed_precision_of_another_trainer_has_its_own_cache(make_trainer):
    """FSDP computes everything in bfloat16, autocast only some operations."""
    trainer = make_trainer(*TOY, "lora={r:4}", "model.policy_mp=bfloat16")
    config = trainer.config

    def directory() -> str:
        return open_cache(trainer.policy, config.reference, config, lambda: trainer.reference).directory

    with_autocast = directory()
    assert directory() == with_autocast
    config.trainer = "FSDPTrainer"
    assert directory() != with_autocast
