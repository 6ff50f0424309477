"""The fast layouts equal the original's computation: two padded sequences per pair, logits at every position."""

import importlib

import pytest
import torch
import transformers

from acceleration import response_head
from acceleration.layout import PLAIN, Layout
from acceleration.prefix_sharing import padded_rows, shared_rows
from acceleration.response_head import chunked_token_logps, response_logps, tree_mask
from benchmarks.architectures import check_model
from data.tokenization import get_collate_fn, tokenize_batch
from distributed.strategies import SingleProcess
from log_probabilities import _get_batch_logps, concatenated_inputs
from losses import LOSSES
from utils import UserError, disable_dropout

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LLAMA_LIKE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS = {
    "gpt2": transformers.GPT2Config(**SMALL, **GPT2_LIKE),
    "gptj": transformers.GPTJConfig(**SMALL, **GPT2_LIKE, rotary_dim=4),
    "gpt_neox": transformers.GPTNeoXConfig(
        **SMALL,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "llama": transformers.LlamaConfig(**SMALL, **LLAMA_LIKE),
    "qwen3": transformers.Qwen3Config(**SMALL, **LLAMA_LIKE, head_dim=8),
}
MAX_LENGTH = 24


def make_model(config, dtype=torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():  # the usual initialization is so small that attention would hardly matter
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    disable_dropout(model)
    return model


class DoubleTorch:
    """Replaces `torch` in a model's code, so that parts that are always in float32 are computed in float64."""

    def __getattr__(self, name: str):
        return torch.float64 if name == "float32" else getattr(torch, name)


@pytest.fixture
def all_in_float64(monkeypatch):
    """Compute GPT-J's attention scores and Llama's norms in float64, too, so that equality shows to 1e-9."""
    for name in ("gptj", "llama", "qwen3", "granite", "mistral"):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        monkeypatch.setattr(module, "torch", DoubleTorch())


class Tokenizer:
    """A tokenizer whose texts are lists of ids."""

    eos_token_id = pad_token_id = 0

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [list(text) for text in texts]}


def make_batch(*parts: tuple[int, int, int], max_length: int = MAX_LENGTH, same: bool = False) -> dict:
    """Return pairs with these numbers of tokens in prompt, chosen and rejected; responses also get an end token."""
    generator = torch.Generator().manual_seed(1)
    texts = [[tuple(torch.randint(1, VOCAB, (n,), generator=generator).tolist()) for n in lengths] for lengths in parts]
    if same:
        texts = [[prompt, chosen, chosen] for prompt, chosen, _ in texts]
    elements = tokenize_batch([(*pair, "keep_end") for pair in texts], Tokenizer(), max_length, max_length // 2)
    return get_collate_fn(Tokenizer())(elements)


BATCHES = {
    "ordinary": make_batch((9, 4, 7), (3, 6, 2), (12, 1, 5)),
    "empty prompts": make_batch((0, 4, 7), (3, 2, 2), (0, 1, 1)),
    "one-token responses": make_batch((5, 0, 0), (2, 0, 3)),
    "identical responses": make_batch((5, 6, 6), (9, 3, 3), same=True),
    "truncated prompt": make_batch((40, 5, 7), (2, 3, 4)),
    "truncated response": make_batch((40, 50, 7), (6, 30, 60)),
    "one pair": make_batch((9, 4, 7)),
}


def original_logps(model, batch: dict) -> torch.Tensor:
    inputs = concatenated_inputs(batch)
    logits = model(inputs["concatenated_input_ids"], attention_mask=inputs["concatenated_attention_mask"]).logits
    return _get_batch_logps(logits, inputs["concatenated_labels"])


def loss_and_gradients(model, logps: torch.Tensor, loss_name: str) -> dict[str, torch.Tensor]:
    """Return the mean loss of the batch and its gradient in every parameter; the reference is arbitrary but fixed."""
    if loss_name == "sft":
        loss = LOSSES["sft"].function(logps).mean()
    else:
        reference = torch.linspace(-40, -10, len(logps), dtype=logps.dtype).chunk(2)
        loss = LOSSES[loss_name].function(*logps.chunk(2), *reference, beta=0.1)[0].mean()
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logps": logps.detach(), **gradients}


def assert_same(ours: dict, expected: dict, tolerance: float):
    assert ours.keys() == expected.keys()
    largest_gradient = max(value.abs().max() for name, value in expected.items() if name not in ("loss", "logps"))
    for name, value in expected.items():
        scale = value.abs().max() if name in ("loss", "logps") else largest_gradient
        difference = (ours[name] - value).abs().max()
        assert difference <= tolerance * max(scale, 1), f"{name}: {difference} of {scale}"


@pytest.mark.parametrize("loss_name", ["dpo", "ipo"])
@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.usefixtures("all_in_float64")
def test_pairs_sharing_a_prompt_give_the_gradients_of_the_original(architecture, batch_name, loss_name):
    model, batch = make_model(CONFIGS[architecture]), BATCHES[batch_name]
    expected = loss_and_gradients(model, original_logps(model, batch), loss_name)
    for rows in (shared_rows(batch), padded_rows(batch)):
        assert_same(loss_and_gradients(model, response_logps(model, rows), loss_name), expected, 1e-9)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_shared_prompts_in_float32_differ_by_rounding_only(architecture):
    model, batch = make_model(CONFIGS[architecture], torch.float32), BATCHES["ordinary"]
    expected = loss_and_gradients(model, original_logps(model, batch), "dpo")
    assert_same(loss_and_gradients(model, response_logps(model, shared_rows(batch)), "dpo"), expected, 1e-5)


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.usefixtures("all_in_float64")
def test_sft_with_the_head_on_responses_only_gives_the_gradients_of_the_original(architecture, batch_name):
    model = make_model(CONFIGS[architecture])
    batch = {key: value for key, value in BATCHES[batch_name].items() if "rejected" not in key}
    logits = model(batch["chosen_input_ids"], attention_mask=batch["chosen_attention_mask"]).logits
    expected = loss_and_gradients(model, _get_batch_logps(logits, batch["chosen_labels"]), "sft")
    assert_same(loss_and_gradients(model, response_logps(model, padded_rows(batch)), "sft"), expected, 1e-9)


def test_shared_row_has_the_expected_layout():
    batch = make_batch((2, 1, 2))
    rows = shared_rows(batch)
    (prompt,), (chosen,), (rejected,) = (
        batch[f"{side}_input_ids"].tolist() for side in ("prompt", "chosen", "rejected")
    )
    assert rows.input_ids.tolist() == [prompt + chosen[2:] + rejected[2:]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert rows.predictors.tolist() == [1, 2, 1, 4, 5]  # the prompt's last token predicts the first of both
    assert rows.targets.tolist() == [*chosen[2:], *rejected[2:]]
    assert rows.sequences.tolist() == [0, 0, 1, 1, 1]


def test_tree_mask_lets_a_response_see_the_prompt_and_itself():
    mask = tree_mask(torch.tensor([[0, 1, 1, 2, 2]]), dtype=None)[0, 0].int()
    assert mask.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    added = tree_mask(torch.tensor([[1, 2]]), dtype=torch.float32)[0, 0]
    assert (added == 0).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_chunked_logits_give_the_same_gradients_whether_kept_or_recomputed(kept_bytes, monkeypatch):
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(10, 8).double(), torch.nn.Linear(8, 5).double(), torch.arange(10) % 5
    hidden.requires_grad_()
    expected = head(hidden).log_softmax(-1)[torch.arange(10), targets]
    expected_gradients = torch.autograd.grad(expected.square().sum(), [hidden, head.weight, head.bias])
    monkeypatch.setattr(response_head, "_CHUNK_BYTES", {"cpu": 3 * 4 * 5})  # chunks of three tokens
    monkeypatch.setattr(response_head, "_KEPT_LOGITS_BYTES", kept_bytes)
    logps = chunked_token_logps(hidden, head, targets, vocab_size=5, strategy=SingleProcess)
    torch.testing.assert_close(logps, expected)
    gradients = torch.autograd.grad(logps.square().sum(), [hidden, head.weight, head.bias])
    torch.testing.assert_close(gradients, expected_gradients)


# ---- supported models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
def test_supported_models_share_prompts(architecture):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(CONFIGS[architecture], torch.float32).to(dtype)
        layout, message = check_model(model, BATCHES["ordinary"], MAX_LENGTH)
        assert layout == Layout(shares_prompts=True)
        assert message == "Prefix sharing: on"


FALLBACKS = {
    "ALiBi": (transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "position_ids|ALiBi"),
    "sliding window": (transformers.MistralConfig(**SMALL, **LLAMA_LIKE, sliding_window=8), "window of 8 tokens"),
    "recurrent": (
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
        "position_ids|recurrent",
    ),
}


@pytest.mark.parametrize("name", FALLBACKS)
@pytest.mark.usefixtures("all_in_float64")
def test_models_that_cannot_share_prompts_fall_back_with_the_reason(name):
    config, reason = FALLBACKS[name]
    model, batch = make_model(config), BATCHES["ordinary"]
    layout, message = check_model(model, batch, MAX_LENGTH)
    assert not (layout.shares_prompts or layout.is_plain)
    assert message.startswith("Prefix sharing: off; ")
    with pytest.raises(
        UserError, match=f"shared_prompt=true, but the model {type(model).__name__} can't: .*({reason})"
    ):
        check_model(model, batch, MAX_LENGTH, shared_prompt=True)
    logps = layout.response_logps(model, batch, SingleProcess)
    torch.testing.assert_close(logps.double(), original_logps(model, batch).double(), rtol=1e-6, atol=1e-6)


def test_window_as_long_as_the_sequences_allows_sharing():
    model = make_model(transformers.MistralConfig(**SMALL, **LLAMA_LIKE, sliding_window=MAX_LENGTH))
    assert check_model(model, BATCHES["ordinary"], MAX_LENGTH, shared_prompt=True)[0].shares_prompts


@pytest.mark.usefixtures("all_in_float64")
def test_model_that_scales_its_logits_computes_them_whole():
    config = transformers.GraniteConfig(**SMALL, **LLAMA_LIKE, logits_scaling=4.0)
    model, batch = make_model(config), BATCHES["ordinary"]
    layout, _ = check_model(model, batch, MAX_LENGTH)
    assert layout == Layout(shares_prompts=True, whole_logits=True)
    expected = loss_and_gradients(model, original_logps(model, batch), "dpo")
    ours = layout.response_logps(model, batch, SingleProcess)
    assert_same(loss_and_gradients(model, ours, "dpo"), expected, 1e-9)


def test_wrong_numbers_from_sharing_are_noticed(monkeypatch):
    def wrong_mask(roles, dtype):
        return tree_mask(torch.zeros_like(roles), dtype)  # the rejected response sees the chosen one

    monkeypatch.setattr(response_head, "tree_mask", wrong_mask)
    model = make_model(CONFIGS["llama"], torch.float32)
    layout, message = check_model(model, BATCHES["ordinary"], MAX_LENGTH)
    assert layout == Layout()
    assert message.startswith("Prefix sharing: off; log-probabilities change by up to ")


def test_shared_prompt_false_computes_two_sequences_per_pair():
    model = make_model(CONFIGS["llama"])
    for padding_free, layout in (("auto", Layout()), (False, PLAIN)):
        settings = {"shared_prompt": False, "padding_free": padding_free}
        assert check_model(model, BATCHES["ordinary"], MAX_LENGTH, **settings) == (layout, "")


def test_dropout_is_off_everywhere():
    for name, rates in {
        "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
        "gptj": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
        "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
        "llama": {"attention_dropout": 0.5},
        "qwen3": {"attention_dropout": 0.5},
    }.items():
        config = CONFIGS[name].__class__(**{**CONFIGS[name].to_dict(), **rates})
        model = make_model(config).train()
        ids = torch.arange(1, 9)[None]
        first, second = (model(ids).logits for _ in range(2))
        model.eval()
        assert torch.equal(first, second), name
        assert torch.equal(first, model(ids).logits), name
