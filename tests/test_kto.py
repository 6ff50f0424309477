"""KTO's estimate of the divergence: its inputs, and independence of microbatches and workers."""

import pytest
import torch
from conftest import ORACLE, read_jsonl
from transformers import AutoTokenizer

from acceleration.whole_batch_losses import estimate_kl
from data.batches import mismatched_batch
from preference_datasets import get_batch_iterator
from utils import UserError

KTO = [
    "model=blank_model", f"model.name_or_path={ORACLE}/model", "datasets=[hh]", f"dataset_paths.hh={ORACLE}/hh",
    "loss=kto", "max_length=128", "max_prompt_length=64", "model.policy_dtype=float64", "model.reference_dtype=float64",
    "lr=1e-3", "warmup_steps=0", "n_examples=24", "batch_size=8", "n_eval_examples=6", "eval_batch_size=4",
    "eval_every=8", "sample_during_eval=false",
]  # fmt: skip


def test_kto_pairs_every_prompt_with_another_prompts_responses():
    tokenizer = AutoTokenizer.from_pretrained(ORACLE / "model")
    tokenizer.pad_token = tokenizer.eos_token
    paths = {"hh": str(ORACLE / "hh")}
    kwargs = {"batch_size": 5, "n_examples": 10, "paths": paths, "silent": True, "mismatched": True}
    whole = list(get_batch_iterator(["hh"], tokenizer, **kwargs))
    for batch in whole:
        others = mismatched_batch(batch)
        assert others["prompt"] == batch["prompt"]
        prompts = list(dict.fromkeys(batch["prompt"]))
        for i, prompt in enumerate(batch["prompt"]):
            j = next(k % 5 for k in range(i + 1, i + 6) if batch["prompt"][k % 5] != prompt or len(prompts) == 1)
            assert others["chosen"][i] == prompt + batch["chosen_response_only"][j]
            assert others["rejected"][i] == prompt + batch["rejected_response_only"][j]
    halves = [list(get_batch_iterator(["hh"], tokenizer, **kwargs, shard=(k, 2))) for k in range(2)]
    texts = [mismatched_batch(half[0])["chosen"] for half in halves]
    assert (texts[0] + texts[1])[:5] == mismatched_batch(whole[0])["chosen"]


def test_kl_estimate_is_the_mean_log_ratio_of_mismatched_responses(make_trainer):
    trainer = make_trainer(*KTO)
    batch = next(iter(trainer.train_iterator))
    assert estimate_kl(trainer, batch).item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.mul_(1.05)
        others = mismatched_batch(batch)
        policy_logps = torch.cat(trainer.concatenated_forward(trainer.policy, others))
        logratios = policy_logps - torch.cat(trainer.reference_logps(others))
    assert abs(logratios.mean().item()) > 1e-3
    estimate = estimate_kl(trainer, batch)
    assert estimate.item() == pytest.approx(max(0, logratios.mean().item()), rel=1e-9)
    assert not estimate.requires_grad


# test_objective_training.py has KTO among the losses of whole batches, too
SETUPS = {
    "two rows": ["shared_prompt=false", "gradient_accumulation_steps=4"],
    "FSDP": ["trainer=FSDPTrainer", "gradient_accumulation_steps=2"],
}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("setup", SETUPS)
def test_kto_with_accumulation_or_workers_gives_the_numbers_of_one_batch(setup, launcher, tmp_path):
    lines = []
    for name, overrides in (("one", []), (setup, SETUPS[setup])):
        n_workers = 2 if "trainer" in "".join(overrides) else 1
        code = launcher.run(*KTO, *overrides, f"local_run_dir={tmp_path}/{name}", n_workers=n_workers)
        assert code == 0, launcher.output
        lines.append(read_jsonl(tmp_path / name / "metrics.jsonl"))
    assert lines[0][0]["loss/eval"] == pytest.approx(0.5, abs=1e-9)  # (1 - σ(0) + 1 - σ(0)) / 2
    assert lines[0][-1]["loss/eval"] != pytest.approx(0.5, abs=1e-3)
    for expected, line in zip(*lines, strict=True):
        for key in line.keys() - {"split", "examples_per_second", "tokens_per_second"}:
            if "accuracies" not in key:
                assert line[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precompute_ref_log_probs=true"], "loss=kto forms new pairs of prompts and responses in every batch"),
        (["batch_size=1", "eval_every=8"], "batch_size=1: loss=kto needs two or more"),
        (["n_eval_examples=5"], "leaves a last batch of one"),
        (["loss.beta=0"], "loss.beta=0: must be a number above 0"),
    ],
    ids=str,
)
def test_kto_without_a_possible_kl_estimate_is_refused(overrides, message, make_trainer):
    with pytest.raises(UserError, match=message):
        make_trainer(*KTO, *overrides)
