"""What is reckoned of a GPU before anything is computed, against figures worked out by hand."""

import pytest
import torch
import transformers

from acceleration.capacity import activation_bytes, microbatch_overhead, tokens_that_fit
from data.microbatches import CPU_OVERHEAD

SIZES = {  # of Pythia: hidden size, layers, heads, parameters outside the embeddings (arXiv 2304.01373, Table 1)
    "70m": (512, 6, 8, 18_915_328), "2.8b": (2560, 32, 32, 2_517_652_480),
}  # fmt: skip
META = torch.device("meta")


def pythia(size: str) -> torch.nn.Module:
    hidden, layers, heads, _ = SIZES[size]
    config = transformers.GPTNeoXConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden,
        vocab_size=50304, tie_word_embeddings=False,
    )  # fmt: skip
    with META:
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("size", "tokens"), [("70m", 10_573), ("2.8b", 424)])
def test_microbatch_overhead_in_tokens_is_larger_for_small_models(size, tokens):
    n_layers, n_parameters = SIZES[size][1], SIZES[size][3]
    assert n_layers * 5e-4 * 4e14 / (6 * n_parameters) == pytest.approx(tokens, rel=1e-3)
    assert microbatch_overhead(pythia(size), META) == pytest.approx(tokens, rel=1e-3)
    assert microbatch_overhead(pythia(size), torch.device("cpu")) == CPU_OVERHEAD


def test_activation_bytes_per_token_match_a_hand_count():
    hidden, layers, *_ = SIZES["2.8b"]
    # of every layer the inputs and outputs of four products: h to 3h, h to h, h to 4h, 4h to h
    kept = 16 * hidden * layers
    assert activation_bytes(pythia("2.8b"), torch.bfloat16, recomputed=False) == pytest.approx(2 * 1.25 * kept)
    once = 1.25 * kept / layers + layers * hidden
    assert activation_bytes(pythia("2.8b"), torch.float32, recomputed=True) == pytest.approx(4 * once)
    # 34 bytes a hidden unit and layer in 16 bits, by Korthikanti et al.; the estimate is above it
    assert 1 < activation_bytes(pythia("2.8b"), torch.bfloat16, recomputed=False) / (34 * hidden * layers) < 1.3


def test_tokens_that_fit_is_none_without_a_gpu():
    assert tokens_that_fit(pythia("70m"), torch.bfloat16, recomputed=False, n_optimizer_states=1) is None
