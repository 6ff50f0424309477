"""The router's auxiliary loss of mixtures of experts (`model.router_aux_loss_coef`) is transformers' own."""

import pytest
import torch
import transformers
from conftest import ORACLE, mark_exhaustive_except, read_jsonl

from log_probabilities import concatenated_inputs
from utils import UserError

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, moe_intermediate_size=16),
    "olmoe": transformers.OlmoeConfig(**SIZES, num_experts=4),
}
RUN = [
    "model=blank_model", f"dataset_paths.hh={ORACLE}/hh", "datasets=[hh]", "max_length=128", "max_prompt_length=64",
    "batch_size=4", "n_examples=8", "n_eval_examples=4", "eval_batch_size=4", "eval_every=4", "lr=1e-2",
    "warmup_steps=0", "sample_during_eval=false", "model.reference_dtype=float32",
]  # fmt: skip
COEFFICIENT = 0.5


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Save a small model for each of `CONFIGS`; return their directories."""
    directory = tmp_path_factory.mktemp("experts")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ORACLE / "model")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        config.vocab_size, config.bos_token_id = len(tokenizer), None
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return {name: str(directory / name) for name in CONFIGS}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "loss", "checkpointed"),
    mark_exhaustive_except(
        [("mixtral", "dpo", False), ("mixtral", "dpo", True), ("qwen3_moe", "sft", True), ("olmoe", "orpo", False)],
        lambda case: case[0] == "mixtral",
    ),
)
def test_loss_and_gradient_are_those_of_transformers(name, loss, checkpointed, models, make_trainer):
    options = [*RUN, f"loss={loss}", f"model.name_or_path={models[name]}", f"activation_checkpointing={checkpointed}"]
    trainer = make_trainer(*options, f"model.router_aux_loss_coef={COEFFICIENT}")
    model = trainer.policy.train()
    batch = next(iter(trainer.train_iterator.batches(0)))
    if loss == "sft":
        ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    else:
        rows = concatenated_inputs(batch)
        ids, mask = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
    assert (mask == 0).any()  # padding, which must not count

    expected = model(ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    (COEFFICIENT * expected).backward()
    of_router = gradients(model)
    total, metrics = trainer.get_batch_metrics(batch, trainer.config.loss)
    total.backward()
    of_both = gradients(model)
    trainer.config.model.router_aux_loss_coef = None
    plain, plain_metrics = trainer.get_batch_metrics(batch, trainer.config.loss)
    plain.backward()
    of_loss = gradients(model)

    assert metrics["aux_loss/train"].tolist() == [expected.item()] * len(batch["prompt"])
    assert total.item() == pytest.approx(plain.item() + COEFFICIENT * expected.item(), rel=1e-5)
    torch.testing.assert_close(metrics["loss/train"], plain_metrics["loss/train"] + COEFFICIENT * expected.detach())
    assert "aux_loss/train" not in plain_metrics
    assert any("gate" in name and grad.abs().max() > 0 for name, grad in of_router.items())
    for name, grad in of_both.items():
        torch.testing.assert_close(grad, of_loss[name] + of_router.get(name, 0), rtol=1e-4, atol=1e-6)


def test_auxiliary_losses_of_microbatches_are_weighted_by_their_examples(models, make_trainer):
    """Three examples make microbatches of two and one; each has the auxiliary loss of its own tokens."""
    options = [*RUN, "loss=sft", f"model.name_or_path={models['mixtral']}", "gradient_accumulation_steps=2"]
    trainer = make_trainer(*options, f"model.router_aux_loss_coef={COEFFICIENT}")
    batch = next(iter(trainer.train_iterator.batches(0)))
    parts = trainer.microbatches(batch, 2)
    assert len(parts) == 2
    losses = []
    for part in parts:
        ids, mask = part["chosen_input_ids"], part["chosen_attention_mask"]
        losses.append(trainer.policy(ids, attention_mask=mask, output_router_logits=True).aux_loss.item())
    sizes = [len(part["prompt"]) for part in parts]
    mean = sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    assert trainer.train_step(batch)["aux_loss/train"] == pytest.approx(mean, rel=1e-6)


def test_model_without_a_router_is_refused(make_trainer):
    with pytest.raises(UserError, match=r"router_aux_loss_coef=0\.01: GPTNeoXForCausalLM gives no auxiliary loss"):
        make_trainer("model=tiny", "datasets=[toy]", "max_length=64", "max_prompt_length=32",
                     "model.router_aux_loss_coef=0.01")  # fmt: skip


@pytest.mark.parametrize("key", ["shared_prompt", "padding_free", "compile"])
def test_requested_fast_layouts_are_refused(key, make_trainer):
    with pytest.raises(UserError, match=rf"router_aux_loss_coef=0\.01 needs the plain forward pass: leave {key} out"):
        make_trainer("model=tiny", "datasets=[toy]", "model.router_aux_loss_coef=0.01", f"{key}=true")


def test_adapter_of_a_mixture_of_experts_trains_without_warnings(models, make_trainer, recwarn):
    trainer = make_trainer(*RUN, "loss=dpo", f"model.name_or_path={models['qwen3_moe']}", "lora.r=2",
                           f"model.router_aux_loss_coef={COEFFICIENT}")  # fmt: skip
    metrics = trainer.train_step(next(iter(trainer.train_iterator.batches(0))))
    assert metrics["loss/train"] == pytest.approx(0.6931 + COEFFICIENT * metrics["aux_loss/train"], abs=1e-3)
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)]
    assert not [str(warning.message) for warning in recwarn if "_pattern" in str(warning.message)]


@pytest.mark.exhaustive
def test_workers_and_resumed_runs_add_the_same_loss(models, launcher, tmp_path):
    # each of two workers has the auxiliary loss of its half of a batch; the mean of both is nearly the whole's
    run = [*RUN, "lr=1e-6", "loss=dpo", f"model.name_or_path={models['mixtral']}", "model.router_aux_loss_coef=50"]
    logged = {}
    for name, options in {"alone": [], "resumed": [], "workers": ["trainer=FSDPTrainer"]}.items():
        words = [*run, *options, f"local_run_dir={tmp_path}/{name}"]
        if name == "resumed":
            assert launcher.run(*words, "n_examples=4") == 0, launcher.output
            words.append("resume=auto")
        assert launcher.run(*words, n_workers=2 if name == "workers" else 1) == 0, launcher.output
        assert "Prefix sharing and packed rows: off, as model.router_aux_loss_coef=50" in launcher.output
        logged[name] = read_jsonl(tmp_path / name / "metrics.jsonl")

    def column(name: str, split: str, metric: str) -> list[float]:
        return [line[metric] for line in logged[name] if line["split"] == split]

    assert column("resumed", "train", "aux_loss/train") == column("alone", "train", "aux_loss/train")
    for split in ("train", "eval"):
        expected = column("alone", split, f"aux_loss/{split}")
        assert column("workers", split, f"aux_loss/{split}") == pytest.approx(expected, rel=0.01)
    # at this coefficient the gradient is mostly the router's
    assert column("workers", "train", "grad_norm") == pytest.approx(column("alone", "train", "grad_norm"), rel=0.2)
