"""Packed rows give the original's numbers, and models that don't support them are detected."""

import copy
from functools import partial

import pytest
import torch
import transformers
from conftest import ORACLE, read_jsonl
from launcher import train_after
from test_shared_prompt import (
    BATCHES,
    CONFIGS,
    LLAMA_LIKE,
    MAX_LENGTH,
    SMALL,
    all_in_float64,  # noqa: F401 (a fixture)
    assert_same,
    loss_and_gradients,
    make_batch,
    make_model,
    original_logps,
)

from acceleration.layout import Layout
from acceleration.packed_attention import Packing, _GatherKeys, packed_attention, use_packed_attention
from acceleration.prefix_sharing import packed_rows, shared_rows
from acceleration.response_head import response_logps
from benchmarks.architectures import check_model
from distributed.strategies import SingleProcess
from log_probabilities import _get_batch_logps
from utils import UserError

SUPPORT_PACKED_ROWS = [name for name in CONFIGS if name != "gptj"]  # GPT-J has its own attention


def model_for_packed_rows(architecture: str, dtype=torch.float64, **changes) -> torch.nn.Module:
    config = copy.deepcopy(CONFIGS[architecture])
    for name, value in changes.items():
        setattr(config, name, value)
    model = make_model(config, dtype)
    use_packed_attention(model)
    return model


# ---- log-probabilities and gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_name", ["dpo", "ipo"])
@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("architecture", SUPPORT_PACKED_ROWS)
@pytest.mark.usefixtures("all_in_float64")
def test_packed_row_gives_the_gradients_of_the_original(architecture, batch_name, loss_name):
    model, batch = model_for_packed_rows(architecture), BATCHES[batch_name]
    expected = loss_and_gradients(model, original_logps(model, batch), loss_name)
    for rows in (packed_rows(batch, shared=True), packed_rows(batch)):
        assert_same(loss_and_gradients(model, response_logps(model, rows), loss_name), expected, 1e-9)


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("architecture", SUPPORT_PACKED_ROWS)
@pytest.mark.usefixtures("all_in_float64")
def test_sft_in_a_packed_row_gives_the_gradients_of_the_original(architecture, batch_name):
    model = model_for_packed_rows(architecture)
    batch = {key: value for key, value in BATCHES[batch_name].items() if "rejected" not in key}
    logits = model(batch["chosen_input_ids"], attention_mask=batch["chosen_attention_mask"]).logits
    expected = loss_and_gradients(model, _get_batch_logps(logits, batch["chosen_labels"]), "sft")
    assert_same(loss_and_gradients(model, response_logps(model, packed_rows(batch)), "sft"), expected, 1e-9)


@pytest.mark.parametrize("architecture", SUPPORT_PACKED_ROWS)
def test_packed_rows_in_float32_differ_by_rounding_only(architecture):
    model, batch = model_for_packed_rows(architecture, torch.float32), BATCHES["ordinary"]
    expected = loss_and_gradients(model, original_logps(model, batch), "dpo")
    logps = response_logps(model, packed_rows(batch, shared=True))
    assert_same(loss_and_gradients(model, logps, "dpo"), expected, 1e-5)


@pytest.mark.parametrize("architecture", SUPPORT_PACKED_ROWS)
@pytest.mark.usefixtures("all_in_float64")
def test_recomputed_activations_give_the_same_gradients(architecture):
    model, rows = model_for_packed_rows(architecture), packed_rows(BATCHES["ordinary"], shared=True)
    expected = loss_and_gradients(model, response_logps(model, rows), "dpo")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(loss_and_gradients(model, response_logps(model, rows), "dpo"), expected, 1e-12)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("all_in_float64")
def test_attention_windows_work_in_packed_rows(window, shared):
    model = make_model(transformers.MistralConfig(**SMALL, **LLAMA_LIKE, sliding_window=window))
    batch = BATCHES["ordinary"]
    expected = loss_and_gradients(model, original_logps(model, batch), "dpo")
    use_packed_attention(model)
    assert_same(loss_and_gradients(model, response_logps(model, packed_rows(batch, shared)), "dpo"), expected, 1e-9)


def test_gradient_of_a_key_that_both_responses_use_is_the_sum_of_both():
    torch.manual_seed(0)
    rows = packed_rows(BATCHES["ordinary"], shared=True)
    tokens = torch.randn(rows.input_ids.shape[1], 2, 3, dtype=torch.float64, requires_grad=True)
    taken = _GatherKeys.apply(tokens, rows.packing)
    torch.testing.assert_close(taken, tokens[rows.packing.key_tokens])
    weights = torch.randn_like(taken)
    ours = torch.autograd.grad((taken * weights).sum(), tokens)
    torch.testing.assert_close(ours, torch.autograd.grad((tokens[rows.packing.key_tokens] * weights).sum(), tokens))


# ---- how rows are packed --------------------------------------------------------------------------------------------


def test_packed_row_with_shared_prompts_has_the_expected_layout():
    batch = make_batch((2, 1, 2), (1, 0, 1))  # an end token is added to each response
    (p, q), (c, d), (r, s) = (
        [ids[:n] for ids, n in zip(batch[f"{side}_input_ids"].tolist(), lengths, strict=True)]
        for side, lengths in (("chosen", (2, 1)), ("chosen", (4, 2)), ("rejected", (5, 3)))
    )
    rows = packed_rows(batch, shared=True)
    assert rows.input_ids.tolist() == [[*c, *r[2:], *d, *s[1:]]]
    assert [p, q] == [c[:2], d[:1]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 1, 2]]
    packing = rows.packing
    assert packing.query_starts.tolist() == [0, 4, 7, 9, 11]
    assert packing.key_starts.tolist() == [0, 4, 9, 11, 14]
    assert packing.key_tokens.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 7, 9, 10]
    assert (packing.longest_query, packing.longest_key) == (4, 5)
    assert packing.own_keys.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 12, 13]
    assert packing.repeated_keys.tolist() == [4, 5, 11]
    assert rows.sequences.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]  # chosen responses, then the rejected
    assert rows.predictors.tolist() == [1, 2, 7, 1, 4, 5, 7, 9]  # a prompt's last token predicts the first of both
    assert rows.targets.tolist() == [*c[2:], *d[1:], *r[2:], *s[1:]]


def test_packed_row_of_single_sequences_has_the_expected_layout():
    batch = make_batch((2, 1, 2))
    rows = packed_rows(batch)
    assert rows.input_ids.tolist() == [[*batch["chosen_input_ids"][0].tolist()[:4], *batch["rejected_input_ids"][0]]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert rows.packing.query_starts.tolist() == rows.packing.key_starts.tolist() == [0, 4, 9]
    assert rows.packing.key_tokens is None
    assert rows.predictors.tolist() == [1, 2, 5, 6, 7]


def test_packed_rows_hold_no_padding():
    batch = make_batch(*((n, n % 5, n % 3) for n in (1, 9, 2, 12, 3, 7, 11, 4)))
    n_tokens = int(batch["chosen_attention_mask"].sum() + (batch["rejected_labels"] != -100).sum())
    assert packed_rows(batch, shared=True).input_ids.shape == (1, n_tokens)


# ---- supported models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", SUPPORT_PACKED_ROWS)
def test_supported_models_get_packed_rows(architecture, dtype):
    model = make_model(copy.deepcopy(CONFIGS[architecture]), torch.float32).to(dtype)
    chosen = check_model(model, BATCHES["ordinary"], MAX_LENGTH, padding_free=True)
    assert chosen == (Layout(shares_prompts=True, is_packed=True), "Prefix sharing: on; rows have no padding")
    chosen = check_model(model, BATCHES["ordinary"], MAX_LENGTH, shared_prompt=False, padding_free=True)
    assert chosen == (Layout(is_packed=True), "Rows have no padding")


def test_model_check_runs_under_autocast():
    model = make_model(copy.deepcopy(CONFIGS["qwen3"]), torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    layout, _ = check_model(model, BATCHES["ordinary"], MAX_LENGTH, autocast, padding_free=True)
    assert layout == Layout(shares_prompts=True, is_packed=True)
    with torch.no_grad(), autocast():
        ours = response_logps(model, packed_rows(BATCHES["ordinary"], shared=True))
        expected = response_logps(model, shared_rows(BATCHES["ordinary"]))
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.1)


def test_rows_are_packed_on_a_cpu_only_on_request():
    model = make_model(CONFIGS["llama"])
    assert check_model(model, BATCHES["ordinary"], MAX_LENGTH, padding_free="auto")[0] == Layout(shares_prompts=True)
    assert model.config._attn_implementation == "sdpa"


def test_models_with_windows_share_prompts_only_in_packed_rows():
    config = transformers.MistralConfig(**SMALL, **LLAMA_LIKE, sliding_window=8)
    model = make_model(config)
    assert check_model(model, BATCHES["ordinary"], MAX_LENGTH)[0] == Layout()
    layout, _ = check_model(model, BATCHES["ordinary"], MAX_LENGTH, shared_prompt=True, padding_free=True)
    assert layout == Layout(shares_prompts=True, is_packed=True)


UNSUPPORTED = {
    "its own attention code": (CONFIGS["gptj"], "attn_implementation=eager doesn't support packed rows"),
    "its own attention class": (
        transformers.StableLmConfig(**SMALL, **LLAMA_LIKE), "log-probabilities change by"
    ),
    "sinks": (
        transformers.GptOssConfig(**SMALL, **LLAMA_LIKE, num_local_experts=2, num_experts_per_tok=1, head_dim=8),
        "doesn't support packed rows|no s_aux",
    ),
    "recurrent layers": (
        transformers.Qwen3NextConfig(
            **SMALL, **LLAMA_LIKE, head_dim=8, num_experts=0, layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8,
        ),
        "the model has recurrent layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_or_fall_back(name):
    config, reason = UNSUPPORTED[name]
    model, batch = make_model(config, torch.float32), BATCHES["ordinary"]
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=rf"padding_free=true, but the model .* can't: .*({reason}).*padding_free=auto"):
        check_model(model, batch, MAX_LENGTH, padding_free=True)
    assert model.config._attn_implementation == before
    layout, _ = check_model(model, batch, MAX_LENGTH, padding_free="auto")
    assert not (layout.is_plain or layout.is_packed)
    logps = layout.response_logps(model, batch, SingleProcess)
    torch.testing.assert_close(logps, original_logps(model, batch), rtol=1e-4, atol=1e-4)


def test_packed_attention_rejects_arguments_it_does_not_support():
    states = torch.randn(1, 2, 4, 8)
    packing = Packing(torch.tensor([0, 4]), torch.tensor([0, 4]), 4, 4)
    attend = partial(packed_attention, None, states, states, states, None, packing=packing)
    assert attend()[0].shape == (1, 4, 2, 8)
    for unsupported in ({"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"dropout": 0.1}, {"position_bias": states}):
        with pytest.raises(NotImplementedError, match=next(iter(unsupported))):
            attend(**unsupported)


def test_packed_attention_changes_neither_generation_nor_the_saved_config(tmp_path):
    model, batch = make_model(copy.deepcopy(CONFIGS["llama"]), torch.float32), BATCHES["ordinary"]
    ids, mask = batch["prompt_input_ids"], batch["prompt_attention_mask"]

    def computed():
        torch.manual_seed(0)
        samples = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, pad_token_id=0)
        with torch.no_grad():
            logits = model(batch["chosen_input_ids"], attention_mask=batch["chosen_attention_mask"]).logits
        return samples, logits

    expected = computed()
    use_packed_attention(model)
    for ours, before in zip(computed(), expected, strict=True):
        assert torch.equal(ours, before)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


# ---- whole runs (those of test_oracle_runs.py have packed rows, too) ------------------------------------------------

RUN = [
    "model=tiny", f"dataset_paths.hh={ORACLE}/hh", "max_length=128", "max_prompt_length=64", "batch_size=8",
    "n_examples=24", "n_eval_examples=6", "eval_batch_size=4", "eval_every=16", "lr=1e-3", "warmup_steps=0",
    "n_eval_model_samples=2", "model.policy_dtype=float64", "model.reference_dtype=float64",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("variant", "n_workers"),
    [
        ("loss=kto", 1), ("loss=dpo lora={r:4}", 1), ("loss=dpo trainer=TensorParallelTrainer", 2),
        ("loss=dpo max_tokens_per_microbatch=300 gradient_accumulation_steps=2 activation_checkpointing=true", 1),
    ],
)  # fmt: skip
def test_run_with_packed_rows_equals_the_run_without_them(variant, n_workers, launcher, tmp_path):
    lines = {}
    for setting in ("false", "true"):
        run_dir = tmp_path / setting
        overrides = [*RUN, *variant.split(), f"padding_free={setting}", f"local_run_dir={run_dir}"]
        overrides += ["sample_during_eval=false"] if n_workers > 1 else []
        assert launcher.run(*overrides, n_workers=n_workers) == 0, launcher.output
        assert ("ows have no padding" in launcher.output) == (setting == "true")
        lines[setting] = read_jsonl(run_dir / "metrics.jsonl")
    assert len(lines["true"]) == len(lines["false"])
    for ours, expected in zip(lines["true"], lines["false"], strict=True):
        assert ours.keys() == expected.keys()
        for key in expected.keys() - {"split", "examples_per_second", "tokens_per_second"}:
            if "accuracies" in key and abs(expected.get(key.replace("accuracies", "margins"), 0)) < 1e-9:
                continue  # policy and reference are equal: which reward is larger is up to rounding
            assert ours[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), key


# ---- compiled -------------------------------------------------------------------------------------------------------


BACKEND = """
from torch import nn
compile = nn.Module.compile
nn.Module.compile = lambda self, **options: compile(self, backend={backend!r}, **options)
"""
SHORT_SFT = ["loss=sft", "n_examples=8", "n_eval_examples=4", "do_first_eval=false", "sample_during_eval=false"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("backend", "more"), [("eager", SHORT_SFT), ("aot_eager", SHORT_SFT), ("inductor", ["loss=dpo"])]
)
def test_compiled_blocks_give_the_uncompiled_numbers(backend, more, launcher, tmp_path):
    """Training uses `inductor`, which takes minutes to generate code.

    `aot_eager` runs the same graphs of forward and backward pass, `eager` only those of the forward pass.
    """
    script, lines = train_after(BACKEND.format(backend=backend), tmp_path), {}
    for setting in ("false", "true"):
        overrides = [*RUN, *more, "padding_free=true", f"compile={setting}", f"local_run_dir={tmp_path}/{setting}"]
        assert launcher.run(*overrides, script=script) == 0, launcher.output
        lines[setting] = read_jsonl(tmp_path / setting / "metrics.jsonl")
    for ours, expected in zip(lines["true"], lines["false"], strict=True):
        for key in ("loss/train", "loss/eval", "grad_norm", "logps_train/chosen", "logps_eval/rejected"):
            assert (key in ours) == (key in expected)
            assert ours.get(key, 0) == pytest.approx(expected.get(key, 0), rel=1e-6), key


@pytest.mark.parametrize("trainer", ["FSDPTrainer", "TensorParallelTrainer"])
def test_compile_is_refused_for_distributed_trainers(trainer, make_trainer):
    with pytest.raises(UserError, match=f"compile=true isn't for trainer={trainer}"):
        make_trainer(*RUN, "loss=dpo", "compile=true", f"trainer={trainer}")
