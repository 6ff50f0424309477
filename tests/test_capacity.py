"""The estimated cost of one more microbatch on a GPU equals figures worked out by hand."""

import pytest
import torch
import transformers

from acceleration.capacity import microbatch_overhead

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
    assert microbatch_overhead(pythia(size)) == pytest.approx(tokens, rel=1e-3)
