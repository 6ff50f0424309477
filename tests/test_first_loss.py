"""Before the first step the reference computes the same as the policy, to the last bit, in every precision."""

import itertools

import pytest
import torch
from conftest import ORACLE, mark_exhaustive_except, read_jsonl, trainers_in

RUN = [
    "model=tiny", "datasets=[hh]", f"dataset_paths.hh={ORACLE}/hh", "loss=dpo", "n_examples=8", "n_eval_examples=8",
    "batch_size=8", "gradient_accumulation_steps=2", "eval_batch_size=8", "max_length=96", "max_prompt_length=48",
    "sample_during_eval=false",
]  # fmt: skip
LN_2 = 0.6931471805599453
PRECISIONS = {
    "float64": ["model.policy_dtype=float64"],
    "float32": [],
    "bfloat16": ["model.policy_dtype=bfloat16"],
    "autocast": ["model.policy_mp=bfloat16"],
}
REFERENCES = {
    "second model": [],
    "precomputed": ["precompute_ref_log_probs=true"],
    "adapter off": ["lora.r=4"],
    "adapter off, precomputed": ["lora.r=4", "precompute_ref_log_probs=true"],
    "second model below an adapter": ["lora.r=4", "reference=model"],
    "second model below an adapter, precomputed": ["lora.r=4", "reference=model", "precompute_ref_log_probs=true"],
    "same weights, named": [
        "model.from_scratch=false",
        "model.name_or_path={model}",
        "reference_model.archive={model}",
    ],
    "saved adapter, its copy": ["model.adapter={adapter}"],
    "saved adapter, loaded again": ["model.adapter={adapter}", "reference=model"],
}
LAYOUTS = {
    "auto": [],
    "plain": ["shared_prompt=false"],
    "packed": ["padding_free=true"],
    "checkpointing": ["activation_checkpointing=true"],
}
BY_DEFAULT = [
    ("float32", "second model", "auto"),
    ("autocast", "second model", "plain"),
    ("autocast", "precomputed", "auto"),
    ("autocast", "same weights, named", "auto"),
    ("bfloat16", "precomputed", "packed"),
    ("bfloat16", "adapter off", "checkpointing"),
    ("float64", "saved adapter, its copy", "auto"),
]
OTHERS = [  # pairwise
    *itertools.product(["autocast"], REFERENCES, ["auto"]),
    *itertools.product(["autocast", "bfloat16"], ["second model", "precomputed", "adapter off"], LAYOUTS),
    *itertools.product(["float64", "float32"], REFERENCES, ["auto"]),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    """Save a model and an adapter; return their directories by name."""
    directory = tmp_path_factory.mktemp("saved")
    make, places = trainers_in(directory), {name: f"{directory}/{name}" for name in ("model", "adapter")}
    trainer = make(*RUN)
    trainer.policy.save_pretrained(places["model"])
    trainer.tokenizer.save_pretrained(places["model"])
    trainer = make(*RUN, "lora.r=4")
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trainer.policy.save_pretrained(places["adapter"])
    return places


@pytest.mark.parametrize(
    ("precision", "reference", "layout"),
    mark_exhaustive_except(dict.fromkeys([*BY_DEFAULT, *OTHERS]), *BY_DEFAULT),
)
def test_first_loss_is_ln_2_and_every_pair_a_tie(precision, reference, layout, make_trainer, saved):
    trainer = make_trainer(
        *RUN, *PRECISIONS[precision], *(word.format(**saved) for word in REFERENCES[reference]), *LAYOUTS[layout]
    )
    n_pairs = 0
    for batches, is_training in ((trainer.train_iterator, True), (trainer.eval_batches, False)):
        trainer.policy.train(is_training)
        for batch in batches:
            for microbatch in trainer.microbatches(batch, min_microbatches=2 if is_training else 1):
                loss, metrics = trainer.get_batch_metrics(microbatch, trainer.config.loss)
                n = len(microbatch["prompt"])
                assert loss.requires_grad
                assert metrics["rewards_train/margins"].tolist() == [0] * n
                assert metrics["rewards_train/ties"].tolist() == [1] * n
                ln_2 = torch.tensor(LN_2, dtype=metrics["loss/train"].dtype)
                assert torch.equal(metrics["loss/train"], ln_2.expand(n))
                n_pairs += n
    assert n_pairs == 16


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("precision", "reference", "trainer"),
    [
        ("autocast", "second model", "FSDP"),
        ("bfloat16", "precomputed", "FSDP"),
        ("autocast", "second model", "TensorParallel"),
        ("bfloat16", "adapter off", "TensorParallel"),
    ],
)
def test_first_evaluation_on_two_workers_has_only_ties(precision, reference, trainer, launcher, tmp_path):
    overrides = [*RUN, *PRECISIONS[precision], *REFERENCES[reference], f"trainer={trainer}Trainer", "eval_every=8"]
    assert launcher.run(*overrides, f"local_run_dir={tmp_path}/run", n_workers=2) == 0, launcher.output
    before, step = read_jsonl(tmp_path / "run/metrics.jsonl")[:2]
    assert (before["split"], before["counters/examples"], step["split"]) == ("eval", 0, "train")
    assert before["rewards_eval/ties"] == step["rewards_train/ties"] == 1
    margins = before["rewards_eval/margins"], step["rewards_train/margins"]
    assert margins == pytest.approx((0, 0), abs=1e-7)  # matrix products may differ in the last bit
    assert before["loss/eval"] == pytest.approx(LN_2, abs=1e-7)
    assert step["loss/train"] == pytest.approx(LN_2, abs=1e-7)


@pytest.mark.parametrize("policy", ["autocast", "bfloat16"])
def test_reference_dtype_applies_to_the_reference_alone(policy, make_trainer):
    trainer = make_trainer(*RUN, *PRECISIONS[policy], "model.reference_dtype=float32")
    assert {parameter.dtype for parameter in trainer.reference.model.parameters()} == {torch.float32}
    exact = make_trainer(*RUN)
    batch = trainer.eval_batches[0]
    assert torch.equal(torch.cat(trainer.reference_logps(batch)), torch.cat(exact.reference_logps(batch)))
    _, metrics = trainer.get_batch_metrics(batch, trainer.config.loss)
    assert 0 < (metrics["loss/train"] - LN_2).abs().max() < 0.1  # the policy's rounding


def test_reference_under_autocast_keeps_linear_weights_in_16_bits(make_trainer):
    trainer = make_trainer(*RUN, *PRECISIONS["autocast"])
    weights = {name: p for name, p in trainer.reference.model.named_parameters() if "norm" not in name}
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    assert dtypes.pop("gpt_neox.embed_in.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.policy.parameters()} == {torch.float32}


def test_reference_that_follows_the_policy_keeps_float32(make_trainer):
    trainer = make_trainer(*RUN, *PRECISIONS["autocast"], "reference_update_every=1")
    assert {parameter.dtype for parameter in trainer.reference.model.parameters()} == {torch.float32}
