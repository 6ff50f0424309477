"""The check of a model at the start of training: which fast ways it may use, and when it is refused."""

import itertools
import json
import shutil

import pytest
import torch
import transformers
from conftest import ORACLE, REPOSITORY, exhaustive_except, read_jsonl
from launcher import train_after
from test_shared_prompt import BATCHES, LLAMA_LIKE, SMALL

from acceleration.capacity import microbatch_overhead
from acceleration.model_check import choose_rows, full_length_pair, synthetic_pair
from acceleration.prefix_sharing import padded_rows, shared_rows
from acceleration.response_head import chunked_token_logps, token_logps
from benchmarks.architectures import batch_of, own_logps, tiny_model
from data.microbatches import microbatches
from distributed.strategies import SingleProcess
from log_probabilities import concatenated_inputs
from utils import UserError

MAX_LENGTH = 192
SHORT = batch_of(((9, 4, 7), (3, 6, 2)))


def as_initialized(config: transformers.PreTrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    """Return a model with weights as small as at the start of training from scratch."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


# ---- what is done to logits -----------------------------------------------------------------------------------------

GEMMA = {**SMALL, **LLAMA_LIKE, "pad_token_id": 0, "head_dim": 8}
CAPPED_OR_SCALED = {
    "Gemma 2, a cap": transformers.Gemma2Config(**GEMMA, final_logit_softcapping=30.0),
    "Gemma 2, a far cap": transformers.Gemma2Config(**GEMMA, final_logit_softcapping=200.0),
    "Granite, a division": transformers.GraniteConfig(**SMALL, **LLAMA_LIKE, logits_scaling=1.01),
    "Cohere, a factor": transformers.CohereConfig(**{**SMALL, "pad_token_id": 0}, **LLAMA_LIKE, logit_scale=0.9375),
    "Falcon-H1, a factor": transformers.FalconH1Config(
        **{**SMALL, **LLAMA_LIKE, "pad_token_id": 0}, lm_head_multiplier=0.5, mamba_d_ssm=64, mamba_n_heads=8,
        mamba_d_head=8, mamba_d_state=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CAPPED_OR_SCALED)
def test_capped_or_scaled_logits_are_noticed_even_when_tiny(name, dtype):
    model = as_initialized(CAPPED_OR_SCALED[name], dtype)
    assert choose_rows(model, BATCHES["ordinary"], "auto", 24)[1], "the output head alone gives other logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neutral_settings_leave_logits_to_the_output_head(dtype):
    configs = [
        transformers.Gemma2Config(**GEMMA, final_logit_softcapping=None),
        transformers.GraniteConfig(**SMALL, **LLAMA_LIKE, logits_scaling=1.0),
    ]
    for config in configs:
        make_rows, whole_logits, _ = choose_rows(as_initialized(config, dtype), BATCHES["ordinary"], "auto", 24)
        assert (make_rows, whole_logits) == (shared_rows, False)


# ---- which rows -----------------------------------------------------------------------------------------------------


def test_full_length_pair_has_the_longest_training_lengths():
    pair = full_length_pair(SHORT, 64)
    assert pair["chosen_input_ids"].shape == (1, 64)
    assert pair["rejected_input_ids"].shape == (1, 16 + 36)
    assert (pair["chosen_input_ids"][:, :16] == pair["rejected_input_ids"][:, :16]).all()
    assert (pair["chosen_labels"] == -100).sum() == (pair["rejected_labels"] == -100).sum() == 16
    assert set(pair["chosen_input_ids"].unique().tolist()) <= set(SHORT["chosen_input_ids"].unique().tolist())
    assert shared_rows(synthetic_pair(SHORT, 0, 64, 64)).input_ids.shape == (1, 128)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_window_by_row_position_is_noticed(dtype):
    model = tiny_model("gpt_neo", window_size=32, max_position_embeddings=1024).to(dtype)
    assert choose_rows(model, SHORT, True, 16)[0] is shared_rows  # whose rows are within the window
    make_rows, whole_logits, why = choose_rows(model, SHORT, "auto", MAX_LENGTH)
    assert (make_rows, whole_logits) == (padded_rows, False)
    assert "can't share them: where the two responses share a row, its log-probabilities differ" in why
    with torch.no_grad():
        torch.testing.assert_close(token_logps(model, padded_rows(batch_of())), own_logps(model, batch_of()))
    with pytest.raises(UserError, match=r"shared_prompt=true, but the model GPTNeoForCausalLM can't: .*differ"):
        choose_rows(model, SHORT, True, MAX_LENGTH)


@pytest.mark.parametrize(("window", "make_rows"), [(MAX_LENGTH - 2, padded_rows), (MAX_LENGTH - 1, shared_rows)])
def test_window_one_token_too_short_is_noticed(window, make_rows):
    """The last token that predicts another has MAX_LENGTH - 2 tokens before it."""
    model = tiny_model("mistral", sliding_window=window).double()
    assert choose_rows(model, SHORT, "auto", MAX_LENGTH)[0] is make_rows


def test_rows_longer_than_a_model_can_compute_are_noticed():
    model = tiny_model("gpt_neo", window_size=1024, max_position_embeddings=2 * MAX_LENGTH - 1)
    make_rows, _, why = choose_rows(model, SHORT, "auto", MAX_LENGTH)
    assert make_rows is padded_rows
    assert "where a row has 384 tokens, its forward fails with RuntimeError" in why
    with pytest.raises(UserError, match="where a row has 384 tokens"):
        choose_rows(model, SHORT, True, MAX_LENGTH)


def test_sequences_longer_than_a_model_can_compute_are_refused():
    model = tiny_model("gpt_neo", max_position_embeddings=MAX_LENGTH - 1)
    for setting in ("auto", False):
        with pytest.raises(UserError, match=r"forward fails on sequences of 192 tokens.*lower max_length"):
            choose_rows(model, SHORT, setting, MAX_LENGTH)


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "moshi", "qwen3_next"])
def test_prompt_sharing_depends_on_layers_not_on_class_names(model_type):
    """Layers of attention alone may be shared, whatever the model's class could hold."""
    types = {
        "granitemoehybrid": {"layer_types": ["attention"] * 4},
        "moshi": {},
        "qwen3_next": {"layer_types": ["full_attention"] * 4},
    }
    model = tiny_model(model_type, **types[model_type])
    assert choose_rows(model, SHORT, True, MAX_LENGTH)[0] is shared_rows
    with torch.no_grad():
        logps = token_logps(model, shared_rows(batch_of()), choose_rows(model, SHORT, True, MAX_LENGTH)[1])
        torch.testing.assert_close(logps, own_logps(model, batch_of()), rtol=1e-4, atol=1e-4)


# ---- the last resort ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", ["auto", True, False])
def test_encoder_is_refused(setting, dtype):
    model = tiny_model("bert").to(dtype)
    with pytest.raises(UserError, match=r"BertLMHeadModel: without a padding mask .* differ .*causal language model"):
        choose_rows(model, SHORT, setting, MAX_LENGTH)


def test_encoder_is_refused_for_sft_too():
    batch = {key: value for key, value in SHORT.items() if "rejected" not in key}
    with pytest.raises(UserError, match="causal language model"):
        choose_rows(tiny_model("bert"), batch, "auto", MAX_LENGTH)


def test_encoder_configured_as_decoder_is_accepted():
    model = tiny_model("bert", is_decoder=True)
    make_rows, whole_logits, _ = choose_rows(model, SHORT, "auto", MAX_LENGTH)
    with torch.no_grad():
        logps = token_logps(model, make_rows(batch_of()), whole_logits)
        torch.testing.assert_close(logps, own_logps(model, batch_of()), rtol=1e-4, atol=1e-4)


def test_model_check_leaves_modes_hooks_and_gradients_untouched():
    model = tiny_model("llama").train()
    choose_rows(model, SHORT, "auto", MAX_LENGTH)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- devices --------------------------------------------------------------------------------------------------------


def test_unknown_devices_get_microbatches_too():
    batch, device = batch_of(), torch.device("meta")
    overhead = microbatch_overhead(tiny_model("llama").to(device), device)
    assert sum(len(part["prompt"]) for part in microbatches(batch, 1, shared=True, overhead=overhead)) == 3
    head, hidden_states = torch.nn.Linear(8, 5, device="meta"), torch.empty(10, 8, device="meta")
    targets = torch.empty(10, dtype=torch.long, device="meta")
    assert chunked_token_logps(hidden_states, head, targets, 5, SingleProcess).shape == (10,)


# ---- whole runs -----------------------------------------------------------------------------------------------------

RUN = [
    "model=blank_model", f"dataset_paths.hh={ORACLE}/hh", "max_length=128", "max_prompt_length=64", "batch_size=4",
    "n_examples=4", "n_eval_examples=6", "eval_batch_size=4", "eval_every=4", "lr=1e-3", "warmup_steps=0",
    "sample_during_eval=false", "do_first_eval=false",
]  # fmt: skip


@pytest.fixture
def model_dir(tmp_path):
    """Write a config with the recorded runs' tokenizer, and weights `scale` times as large as drawn."""

    def write(config: transformers.PreTrainedConfig, scale: float = 1.0, **keys) -> str:
        directory = tmp_path / "model"
        shutil.copytree(ORACLE / "model", directory)
        (directory / "model.safetensors").unlink()
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        model.save_pretrained(directory)
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
        return str(directory)

    return write


SIZES = {**LLAMA_LIKE, "vocab_size": 512, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0}
GEMMA2 = transformers.Gemma2Config(**SIZES, head_dim=8, pad_token_id=0, tie_word_embeddings=False)

GRANITE = transformers.GraniteConfig(**SIZES, logits_scaling=4.0)


def mean_loss(model: torch.nn.Module, batches: list[dict]) -> float:
    """Return the SFT loss computed by the model's own forward."""
    losses = []
    for batch in batches:
        inputs = concatenated_inputs({**batch, **{key.replace("chosen", "rejected"): v for key, v in batch.items()}})
        labels = inputs["concatenated_labels"][:, 1:]
        with torch.no_grad():
            logits = model(
                inputs["concatenated_input_ids"], attention_mask=inputs["concatenated_attention_mask"]
            ).logits.float()
        logps = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        losses += (-(logps * (labels != -100)).sum(1))[: len(batch["prompt"])].tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("dtype", "scale", "lr", "tolerance"),
    [("float32", 1.0, 0.1, 1e-5), ("bfloat16", 20.0, 1e-3, 1e-3)],
    ids=["from scratch, which ends with large logits", "with weights as large as trained ones"],
)
def test_gemma_2_trains_the_model_that_it_exports(dtype, scale, lr, tolerance, make_trainer, model_dir):
    path = model_dir(GEMMA2, scale)
    trainer = make_trainer(
        *RUN, f"model.name_or_path={path}", f"model.policy_dtype={dtype}", f"lr={lr}", "max_grad_norm=inf", "loss=sft"
    )
    trainer.train()
    trainer.save()
    run_dir = trainer.config.local_run_dir
    loss = read_jsonl(REPOSITORY / run_dir / "metrics.jsonl")[-1]["loss/eval"]
    exported = transformers.AutoModelForCausalLM.from_pretrained(f"{run_dir}/LATEST", dtype=getattr(torch, dtype))
    assert loss == pytest.approx(mean_loss(exported, trainer.eval_batches), rel=tolerance)
    exported.config.final_logit_softcapping = None
    assert loss != pytest.approx(mean_loss(exported, trainer.eval_batches), rel=3 * tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "loss"),
    exhaustive_except(
        itertools.product(["FSDPTrainer", "TensorParallelTrainer"], ["sft", "dpo"]),
        ("FSDPTrainer", "dpo"),
        ("TensorParallelTrainer", "sft"),
    ),
)
def test_workers_choose_the_layout_that_one_process_does(trainer, loss, launcher, model_dir, tmp_path):
    path = model_dir(GEMMA2 if trainer == "FSDPTrainer" else GRANITE, scale=20.0)
    overrides = [
        *RUN, f"model.name_or_path={path}", f"loss={loss}", "model.policy_dtype=float64",
        "model.reference_dtype=float64",
    ]  # fmt: skip
    last = {}
    for run_dir, n_workers, choice in ((tmp_path / "1", 1, []), (tmp_path / "2", 2, [f"trainer={trainer}"])):
        code = launcher.run(*overrides, *choice, f"local_run_dir={run_dir}", n_workers=n_workers)
        assert code == 0, launcher.output
        assert "its logits whole, as the model does more than apply its output head" in launcher.output
        last[n_workers] = read_jsonl(run_dir / "metrics.jsonl")[-1]
    for key in last[1].keys() - {"split", "examples_per_second", "tokens_per_second"}:
        assert last[2][key] == pytest.approx(last[1][key], rel=1e-5, abs=1e-5), key


@pytest.mark.slow
def test_workers_fall_back_together_and_refuse_together(launcher, model_dir, tmp_path):
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "bos_token_id": 0}
    sizes |= {"eos_token_id": 0, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 255}
    path = model_dir(transformers.GPTNeoConfig(**sizes, window_size=1024))
    overrides = [*RUN, f"model.name_or_path={path}", "loss=dpo", "trainer=FSDPTrainer", "model.reference_dtype=float32"]
    assert launcher.run(*overrides, f"local_run_dir={tmp_path}/run", n_workers=2) == 0, launcher.output
    assert "where a row has 256 tokens, its forward fails with RuntimeError" in launcher.output
    assert launcher.run(*overrides, "shared_prompt=true", f"local_run_dir={tmp_path}/no", n_workers=2) == 1
    assert "error: shared_prompt=true, but the model GPTNeoForCausalLM can't" in launcher.output
    assert "Traceback" not in launcher.output
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_workers_that_compute_in_16_bits_share_prompts(launcher, tmp_path):
    overrides = [*RUN, "model=tiny", "loss=dpo", "trainer=FSDPTrainer", "model.policy_mp=bfloat16", "debug=true"]
    assert launcher.run(*overrides, f"local_run_dir={tmp_path}/run", n_workers=2) == 0, launcher.output
    assert "Shared prompts: each prompt is computed once a pair\n" in launcher.output


@pytest.mark.slow
def test_flex_attention_without_gradients_is_refused(launcher, model_dir, tmp_path):
    path = model_dir(transformers.LlamaConfig(**SIZES), attn_implementation="flex_attention")
    script = train_after("import torch; torch._dynamo.config.disable = True", tmp_path)  # compiling takes long
    run = [*RUN, f"model.name_or_path={path}", "loss=sft", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run, script=script) == 1
    assert "error: LlamaForCausalLM: its own forward fails" in launcher.output
    assert "attn_implementation=flex_attention now; sdpa and eager" in launcher.output
    assert "Traceback" not in launcher.output
    assert not (tmp_path / "run").exists()
