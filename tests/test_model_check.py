"""The check at the start of training: the layout it chooses, and the models it refuses."""

import itertools
import json
import shutil

import pytest
import torch
import transformers
from conftest import ORACLE, REPOSITORY, mark_exhaustive_except, read_jsonl
from launcher import train_after
from test_shared_prompt import BATCHES, CONFIGS, LLAMA_LIKE, SMALL, make_model

import trainers
from acceleration import packed_attention, response_head
from acceleration.capacity import microbatch_overhead
from acceleration.layout import PLAIN, Layout
from acceleration.measurement import each_alone, full_length_batch, synthetic_batch
from acceleration.response_head import chunked_token_logps
from benchmarks.architectures import batch_of, check_model, compare, own_logps, tiny_model
from data.microbatches import microbatches
from distributed.strategies import SingleProcess
from log_probabilities import concatenated_inputs
from utils import UserError, disable_dropout

MAX_LENGTH = 192
SHORT = batch_of(((9, 4, 7), (3, 6, 2)))


def as_initialized(config: transformers.PreTrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    """Return a model with weights as small as at the start of training from scratch."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


# ---- logits that are capped or scaled -------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("name", "dtype"),
    mark_exhaustive_except(
        itertools.product(CAPPED_OR_SCALED, [torch.float32, torch.bfloat16, torch.float16]),
        lambda case: case[1] == torch.bfloat16,
    ),
    ids=str,
)
def test_capped_or_scaled_logits_are_noticed_even_when_tiny(name, dtype):
    model = as_initialized(CAPPED_OR_SCALED[name], dtype)
    assert check_model(model, BATCHES["ordinary"], 24)[0].whole_logits, "the output head alone gives other logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neutral_settings_leave_logits_to_the_output_head(dtype):
    configs = [
        transformers.Gemma2Config(**GEMMA, final_logit_softcapping=None),
        transformers.GraniteConfig(**SMALL, **LLAMA_LIKE, logits_scaling=1.0),
    ]
    for config in configs:
        assert check_model(as_initialized(config, dtype), BATCHES["ordinary"], 24)[0] == Layout(shares_prompts=True)


# ---- synthetic examples ---------------------------------------------------------------------------------------------


def test_synthetic_examples_have_the_requested_lengths_and_tokens_of_the_data():
    batch = synthetic_batch(SHORT, [(2, 5), (0, 8)])
    assert batch["chosen_attention_mask"].sum(1).tolist() == batch["rejected_attention_mask"].sum(1).tolist() == [5, 8]
    assert (
        (batch["chosen_labels"] != -100).sum(1).tolist() == (batch["rejected_labels"] != -100).sum(1).tolist() == [3, 8]
    )
    assert (batch["chosen_input_ids"][0, :2] == batch["rejected_input_ids"][0, :2]).all()
    assert (batch["chosen_input_ids"][0, 2:5] != batch["rejected_input_ids"][0, 2:5]).any()
    assert set(batch["chosen_input_ids"][1].tolist()) <= set(SHORT["chosen_input_ids"].flatten().tolist())
    alone = [example["chosen_input_ids"].shape for example in each_alone(batch)]
    assert alone == [(1, 5), (1, 8)]
    assert full_length_batch(SHORT, 64)["chosen_input_ids"].shape == (1, 64)


# ---- the choice of the layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", mark_exhaustive_except([torch.float64, torch.float32, torch.bfloat16], torch.bfloat16), ids=str
)
def test_attention_window_by_row_position_is_noticed(dtype):
    model = tiny_model("gpt_neo", window_size=32, max_position_embeddings=1024).to(dtype)
    assert check_model(model, SHORT, 16, shared_prompt=True)[0].shares_prompts  # rows are within the window
    layout, message = check_model(model, SHORT)
    assert layout == Layout()
    assert "Prefix sharing: off; the model's local attention (window of 32) ignores position_ids" in message
    if dtype != torch.bfloat16:
        assert compare(model, layout)["gradient"] < 1e-4
    with pytest.raises(UserError, match=r"shared_prompt=true, but the model GPTNeoForCausalLM can't: the model's loc"):
        check_model(model, SHORT, shared_prompt=True)


# For the last three, the difference is within rounding in bfloat16.
@pytest.mark.parametrize(
    ("model_type", "why"),
    mark_exhaustive_except(
        [
            ("mistral", "the model attends to a window of 128 tokens, max_length is 192"),
            ("deepseek_v4", "the model has recurrent layers"),
            ("granitemoe_swa", "the model attends to a window of 128 tokens, max_length is 192"),
            ("mimo_v2_flash", "the model attends to a window of 129 tokens, max_length is 192"),
        ],
        lambda case: case[0] in ("mistral", "granitemoe_swa"),
    ),
)
def test_design_that_excludes_prompt_sharing_is_noticed_in_16_bits(model_type, why):
    model = tiny_model(model_type)
    if model_type == "mistral":
        model.config.sliding_window = 128
    layout, message = check_model(model.to(torch.bfloat16), SHORT)
    assert layout == Layout()
    assert message.startswith(f"Prefix sharing: off; {why}")


@pytest.mark.parametrize(("window", "shares_prompts"), [(MAX_LENGTH - 2, False), (MAX_LENGTH - 1, True)])
def test_window_one_token_too_short_is_noticed(window, shares_prompts):
    """MAX_LENGTH - 2 tokens precede the last token that predicts another one."""
    model = tiny_model("mistral", sliding_window=window).double()
    assert check_model(model, SHORT)[0] == Layout(shares_prompts)


def test_requested_sharing_of_unpaired_prompts_is_refused(make_trainer, tmp_path):
    rows = [{"prompt": f"Name {i}.", "completion": f" {i}", "label": i % 2 == 0} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["model=tiny", f"datasets=[{tmp_path}/rows.jsonl]", "loss=kto", "batch_size=4", "test_fraction=0.4"]
    make_trainer(*run)
    with pytest.raises(UserError, match="no two responses share a prompt; use shared_prompt=auto"):
        make_trainer(*run, "shared_prompt=true")


def test_rows_longer_than_a_model_can_compute_are_noticed():
    model = tiny_model("gpt_neo", window_size=1024, max_position_embeddings=2 * MAX_LENGTH - 1)
    layout, message = check_model(model, SHORT)
    assert layout == Layout()
    assert message.startswith("Prefix sharing: off; the forward pass fails with RuntimeError")
    with pytest.raises(UserError, match="the forward pass fails with RuntimeError"):
        check_model(model, SHORT, shared_prompt=True)


def test_sequences_longer_than_a_model_can_compute_are_refused():
    model = tiny_model("gpt_neo", max_position_embeddings=MAX_LENGTH - 1)
    for settings in ({}, {"shared_prompt": False}, {"shared_prompt": False, "padding_free": False}):
        with pytest.raises(UserError, match=r"forward fails on sequences of up to 192 tokens.*lower max_length"):
            check_model(model, SHORT, **settings)


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "moshi", "qwen3_next"])
def test_prompt_sharing_depends_on_layers_not_on_class_names(model_type):
    types = {
        "granitemoehybrid": {"layer_types": ["attention"] * 4},
        "moshi": {},
        "qwen3_next": {"layer_types": ["full_attention"] * 4},
    }
    model = tiny_model(model_type, **types[model_type])
    layout, _ = check_model(model, SHORT, shared_prompt=True)
    assert compare(model, layout)["gradient"] < 1e-3


def test_model_check_leaves_modes_hooks_gradients_and_random_numbers_untouched():
    for is_training in (True, False):
        model = tiny_model("opt").train(is_training)  # it draws random numbers in training
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        check_model(model, SHORT)
        assert torch.equal(torch.rand(3), expected)
        assert model.training == is_training
        assert not any(module._forward_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


# ---- refused models -------------------------------------------------------------------------------------------------

PLAIN_SETTINGS = {"shared_prompt": False, "padding_free": False}


@pytest.mark.parametrize(
    ("model_type", "settings", "dtype"),
    mark_exhaustive_except(
        itertools.product(
            ["bert", "cpmant", "prophetnet"], [{}, {"shared_prompt": True}, PLAIN_SETTINGS],
            [torch.float32, torch.bfloat16],
        ),
        lambda case: case[1] == {} and case[2] == torch.bfloat16,
        ("bert", PLAIN_SETTINGS, torch.float32),
    ),
    ids=str,
)  # fmt: skip
def test_model_that_sees_what_it_predicts_is_refused(model_type, settings, dtype):
    """CPM-Ant's prompts see the response, ProphetNet's n-grams later tokens; padding changes the result of both."""
    model = tiny_model(model_type).to(dtype)
    with pytest.raises(UserError, match=r"its predictions depend on the very tokens that they predict"):
        check_model(model, SHORT, **settings)


def test_encoder_is_refused_for_sft_too():
    batch = {key: value for key, value in SHORT.items() if "rejected" not in key}
    with pytest.raises(UserError, match="causal language model"):
        check_model(tiny_model("bert"), batch)


def test_encoder_configured_as_decoder_is_accepted():
    model = tiny_model("bert", is_decoder=True)
    layout, _ = check_model(model, SHORT)
    assert compare(model, layout)["gradient"] < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, PLAIN_SETTINGS], ids=str)
def test_model_that_routes_at_random_in_training_is_refused(settings, dtype):
    model = tiny_model("phimoe").to(dtype)
    with pytest.raises(UserError, match=r"PhimoeForCausalLM: its results are random in training.* differ by \d"):
        check_model(model, SHORT, **settings)


@pytest.mark.parametrize(
    ("model_type", "noise"), [("mixtral", {"router_jitter_noise": 0.1}), ("opt", {"layerdrop": 0.5})]
)
def test_training_noise_is_turned_off_with_dropout(model_type, noise):
    model = tiny_model(model_type, **noise)
    assert check_model(model, SHORT)[0].shares_prompts
    model.train()
    assert torch.equal(*(own_logps(model, SHORT) for _ in range(2)))


class CountsFromTheEnd(transformers.GPT2LMHeadModel):
    """Counts positions from the end of a row, padding included."""

    def forward(self, input_ids, **kwargs):
        kwargs["position_ids"] = torch.arange(255 - input_ids.shape[1], 255)[None]
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize("settings", [{"padding_free": False}, PLAIN_SETTINGS], ids=str)
def test_model_whose_padding_changes_what_it_computes_is_refused(settings):
    torch.manual_seed(0)
    model = CountsFromTheEnd(transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256))
    with torch.no_grad():
        model.transformer.wpe.weight.normal_(0, 0.3)
    disable_dropout(model)
    with pytest.raises(
        UserError, match=r"CountsFromTheEnd is wrong on padded batches: log-probabilities change .*padding_free=true"
    ):
        check_model(model, SHORT, **settings)


def test_weights_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        next(model.parameters())[:] = torch.inf
    with pytest.raises(UserError, match="LlamaForCausalLM: its log-probabilities or their gradient aren't finite"):
        check_model(model, SHORT)


# ---- fast paths that differ from the plain forward ------------------------------------------------------------------


class TooSteep(torch.autograd.Function):
    """Copies a tensor, but makes its gradient 1.1 times as large."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return 1.1 * gradient


def test_wrong_backward_of_packed_attention_is_noticed(monkeypatch):
    attend = packed_attention._by_segment
    monkeypatch.setattr(packed_attention, "_by_segment", lambda *args: TooSteep.apply(attend(*args)))
    model = make_model(CONFIGS["llama"], torch.float32)
    with pytest.raises(UserError, match=r"padding_free=true, .*the gradient changes by"):
        check_model(model, BATCHES["ordinary"], 24, padding_free=True)


def test_wrong_backward_of_the_output_head_is_noticed(monkeypatch):
    compute = response_head.chunked_token_logps
    monkeypatch.setattr(
        response_head, "chunked_token_logps", lambda hidden, *args: compute(TooSteep.apply(hidden), *args)
    )
    layout, message = check_model(make_model(CONFIGS["llama"], torch.float32), BATCHES["ordinary"], 24)
    assert layout == PLAIN
    assert message == "Prefix sharing: off; the gradient changes by 10 %; concatenated_forward is used instead"


EDITED = ["model=blank_model", f"model.name_or_path={ORACLE}/model", f"dataset_paths.hh={ORACLE}/hh", "max_length=128",
          "max_prompt_length=64", "batch_size=4", "n_examples=4", "n_eval_examples=4", "eval_batch_size=4",
          "do_first_eval=false", "sample_during_eval=false", "eval_every=4"]  # fmt: skip


def first_step(trainer: trainers.BasicTrainer) -> dict[str, float]:
    return trainer.train_step(next(trainer.train_iterator.batches(0)))


@pytest.mark.parametrize(("loss", "metric"), [("dpo", "logps_train/chosen"), ("sft", "loss/train")])
def test_edit_of_get_batch_logps_changes_what_is_trained(loss, metric, make_trainer, monkeypatch, capsys):
    expected = first_step(make_trainer(*EDITED, f"loss={loss}"))
    line = "" if loss == "sft" else "Prefix sharing: on\n"
    assert line in capsys.readouterr().out
    original = trainers._get_batch_logps
    monkeypatch.setattr(trainers, "_get_batch_logps", lambda *args, **kwargs: 2 * original(*args, **kwargs))
    trainer = make_trainer(*EDITED, f"loss={loss}")
    assert trainer.layout == PLAIN
    subject, plain = {"dpo": ("Prefix sharing", "concatenated_forward"),
                      "sft": ("Output head at responses only", "plain_logps")}[loss]  # fmt: skip
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is used instead" in line]
    assert line.startswith(f"{subject}: off; log-probabilities change by up to ")
    assert line.endswith(f" nats; {plain} is used instead")
    step = first_step(trainer)
    assert step[metric] == pytest.approx(2 * expected[metric], rel=1e-5)
    if loss == "sft":
        assert step["grad_norm"] == pytest.approx(2 * expected["grad_norm"], rel=1e-4)


def test_subclass_that_edits_concatenated_forward_changes_what_is_trained(make_trainer, monkeypatch, capsys):
    class Edited(trainers.BasicTrainer):
        """Trains on log-probabilities divided by 2."""

        def concatenated_forward(self, model, batch):
            return tuple(logps / 2 for logps in super().concatenated_forward(model, batch))

    expected = first_step(make_trainer(*EDITED, "loss=dpo"))
    monkeypatch.setattr(trainers, "BasicTrainer", Edited)
    step = first_step(make_trainer(*EDITED, "loss=dpo"))
    assert "concatenated_forward is used instead" in capsys.readouterr().out
    assert step["logps_train/rejected"] == pytest.approx(expected["logps_train/rejected"] / 2, rel=1e-5)
    assert step["grad_norm"] == pytest.approx(expected["grad_norm"] / 2, rel=1e-3)


# ---- devices --------------------------------------------------------------------------------------------------------


def test_batches_on_unknown_devices_are_divided_into_microbatches():
    batch, device = batch_of(), torch.device("meta")
    overhead = microbatch_overhead(tiny_model("llama").to(device))
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
    """Return a function that saves a model of a config, with weights scaled by `scale`, and the recorded tokenizer."""

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


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "loss"),
    [("FSDPTrainer", "dpo"), ("TensorParallelTrainer", "sft")],
)
def test_workers_choose_the_same_layout_as_one_process(trainer, loss, launcher, model_dir, tmp_path):
    path = model_dir(GEMMA2 if trainer == "FSDPTrainer" else GRANITE, scale=20.0)
    overrides = [
        *RUN, f"model.name_or_path={path}", f"loss={loss}", "model.policy_dtype=float64",
        "model.reference_dtype=float64",
    ]  # fmt: skip
    last = {}
    for run_dir, n_workers, choice in ((tmp_path / "1", 1, []), (tmp_path / "2", 2, [f"trainer={trainer}"])):
        code = launcher.run(*overrides, *choice, f"local_run_dir={run_dir}", n_workers=n_workers)
        assert code == 0, launcher.output
        assert "ogits at every position, because the model modifies its output head's result" in launcher.output
        last[n_workers] = read_jsonl(run_dir / "metrics.jsonl")[-1]
    for key in last[1].keys() - {"split", "examples_per_second", "tokens_per_second"}:
        assert last[2][key] == pytest.approx(last[1][key], rel=1e-5, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.exhaustive
def test_workers_fall_back_together_and_refuse_together(launcher, model_dir, tmp_path):
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "bos_token_id": 0}
    sizes |= {"eos_token_id": 0, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 255}
    path = model_dir(transformers.GPTNeoConfig(**sizes, window_size=1024))
    overrides = [*RUN, f"model.name_or_path={path}", "loss=dpo", "trainer=FSDPTrainer", "model.reference_dtype=float32"]
    assert launcher.run(*overrides, f"local_run_dir={tmp_path}/run", n_workers=2) == 0, launcher.output
    assert "Prefix sharing: off; the forward pass fails with RuntimeError" in launcher.output
    assert launcher.run(*overrides, "shared_prompt=true", f"local_run_dir={tmp_path}/no", n_workers=2) == 1
    assert "error: shared_prompt=true, but the model GPTNeoForCausalLM can't" in launcher.output
    assert "Traceback" not in launcher.output
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_flex_attention_without_gradients_is_refused(launcher, model_dir, tmp_path):
    path = model_dir(transformers.LlamaConfig(**SIZES), attn_implementation="flex_attention")
    script = train_after("import torch; torch._dynamo.config.disable = True", tmp_path)  # compiling takes long
    run = [*RUN, f"model.name_or_path={path}", "loss=sft", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run, script=script) == 1
    assert "error: LlamaForCausalLM: plain_logps fails" in launcher.output
    assert "set model.attn_implementation to sdpa or eager (now flex_attention)" in launcher.output
    assert "Traceback" not in launcher.output
    assert not (tmp_path / "run").exists()
