"""Samples come from the model's own softmax, whatever its generation config says."""

import itertools

import pytest
import torch
from conftest import ORACLE, mark_exhaustive_except
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MixtralConfig, MixtralForCausalLM

from evaluation.sampling import generate_as_targets

N_SAMPLES, N_TOKENS = 4096, 8

GENERATION_CONFIGS = {  # settings that a model's own generation config may have
    "nothing": {},
    "temperature": {"do_sample": True, "temperature": 0.2, "top_k": 3, "top_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 100.0},
    "min_p": {"min_p": 0.5},
    "typical_p": {"typical_p": 0.1},
    "cutoffs": {"epsilon_cutoff": 0.3, "eta_cutoff": 0.3},
    "suppress_tokens": {"suppress_tokens": [5, 6], "begin_suppress_tokens": [7]},
    "bad words": {"bad_words_ids": [[5], [6]]},
    "n-grams": {"no_repeat_ngram_size": 1},
    "beams": {"num_beams": 3},
    "forced": {"forced_eos_token_id": 9, "min_new_tokens": 5, "max_length": 300},
    "several": {"num_return_sequences": 2, "do_sample": True},
    "contrast": {"penalty_alpha": 0.6, "top_k": 4},
    "guidance": {"guidance_scale": 3.0},
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ORACLE / "model")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def small_model():
    """Return a model for which eight of 512 tokens are likely, among them 5, 6, 7 and 9."""
    model = AutoModelForCausalLM.from_pretrained(ORACLE / "model").eval()
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.full((512,), -20.0))
    head.bias.data[torch.tensor([5, 6, 7, 9, 11, 12, 13, 14])] = torch.linspace(0, 2, N_TOKENS)
    return model


def one_token_prompts(n: int) -> dict:
    ids = torch.tensor([[5]]).repeat(n, 1)
    return {"prompt_input_ids": ids, "prompt_attention_mask": torch.ones_like(ids)}


class IdTokenizer:
    """A tokenizer that decodes each id to the character with that number."""

    eos_token_id = pad_token_id = 0

    @staticmethod
    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def generate(model, tokenizer, batch: dict, max_length: int) -> list[str]:
    return generate_as_targets(model, tokenizer, batch, max_length, stops=lambda: False, synced=False)[0]


def generate_ids(model, batch: dict, max_length: int) -> list[list[int]]:
    return [list(map(ord, response)) for response in generate(model, IdTokenizer, batch, max_length)]


def test_mixture_of_experts_that_returns_router_logits_is_sampled():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, output_router_logits=True, eos_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    batch = one_token_prompts(2)
    assert len(generate(model, IdTokenizer, batch, max_length=8)) == 2
    assert model.config.output_router_logits
    assert model(batch["prompt_input_ids"]).aux_loss is not None  # sampling has restored the setting


@pytest.mark.parametrize(
    ("name", "has_adapter"),
    mark_exhaustive_except(
        itertools.product(GENERATION_CONFIGS, [False, True]),
        ("nothing", False),
        ("temperature", True),
        ("suppress_tokens", False),
        ("beams", False),
        ("forced", False),
    ),
)
def test_first_tokens_follow_the_softmax(name, has_adapter):
    model = small_model()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, **GENERATION_CONFIGS[name])
    if has_adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).eval()
    former = model.generation_config
    batch = one_token_prompts(N_SAMPLES)
    with torch.no_grad():
        expected = model(batch["prompt_input_ids"][:1]).logits[0, -1].double().softmax(-1)
    torch.manual_seed(0)
    rows = generate_ids(model, batch, max_length=2)
    assert len(rows) == N_SAMPLES
    counts = torch.bincount(torch.tensor([row[0] for row in rows]), minlength=512).double()
    likely = expected * N_SAMPLES > 5
    assert int(likely.sum()) == N_TOKENS
    assert counts[~likely].sum() <= 3
    chi_square = ((counts - N_SAMPLES * expected)[likely] ** 2 / (N_SAMPLES * expected[likely])).sum()
    assert chi_square < 24.3  # 99.9 % of chi-square with 7 degrees of freedom
    assert model.generation_config is former


@pytest.mark.parametrize("own", [None, 9, [9, 11]])
def test_sample_ends_at_the_end_tokens_of_tokenizer_and_model(own):
    model = small_model()
    model.generation_config = GenerationConfig(eos_token_id=own)
    model.get_output_embeddings().bias.data[0] = 1.0
    rows = generate_ids(model, one_token_prompts(64), max_length=20)
    ends = {0, *(own if isinstance(own, list) else [own] if own else [])}
    seen = set()
    for row in rows:
        first = next((place for place, token in enumerate(row) if token in ends), None)
        if first is not None:
            seen.add(row[first])
            assert first == len(row) - 1
    assert seen == ends


def test_empty_prompts_have_empty_samples(tokenizer):
    model = small_model()
    ids = torch.tensor([[0, 0], [5, 6], [0, 7]])
    mixed = {"prompt_input_ids": ids, "prompt_attention_mask": torch.tensor([[0, 0], [1, 1], [0, 1]])}
    texts = generate(model, tokenizer, mixed, max_length=8)
    assert texts[0] == "" and texts[1] and texts[2]
    empty = torch.zeros((2, 0), dtype=torch.long)
    alone = {"prompt_input_ids": empty, "prompt_attention_mask": empty}
    assert generate(model, tokenizer, alone, max_length=8) == ["", ""]


def test_prompts_beside_an_empty_one_are_sampled_as_without_it():
    """Scaled logits make the draw greedy: the likeliest token has all the probability."""
    model = small_model()
    model.get_output_embeddings().weight.data *= 1000
    ids = torch.tensor([[0, 0, 0], [5, 6, 7]])
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    both = generate_ids(model, {"prompt_input_ids": ids, "prompt_attention_mask": mask}, 12)
    one = generate_ids(model, {"prompt_input_ids": ids[1:], "prompt_attention_mask": mask[1:]}, 12)
    assert both[1] == one[0]
