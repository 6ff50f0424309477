"""Architectures that rule out some layouts: the layout chosen for each, and equality with the model's own numbers.

benchmarks/architectures.py does the same for every model type.
"""

from dataclasses import replace

import pytest
import torch
from conftest import mark_exhaustive_except

from acceleration.layout import Layout
from benchmarks.architectures import batch_of, check_model, compare, tiny_model
from utils import UserError

SHORT = batch_of(((9, 4, 7), (3, 6, 2)))
IN_FLOAT32 = ("mixtral", "gpt_oss", "granitemoehybrid", "qwen3_next", "deepseek_v3")  # experts have no float64

SHARED, PADDED = Layout(shares_prompts=True), Layout()
SHARED_WHOLE, PADDED_WHOLE = Layout(shares_prompts=True, whole_logits=True), Layout(whole_logits=True)
DECISIONS = {
    "a cap on logits": ("gemma2", {}, SHARED_WHOLE),
    "two rotary embeddings": ("gemma3_text", {}, SHARED),
    "windows shorter than sequences": ("gemma3_text", {"sliding_window": 32}, PADDED),
    "windows by place in the row": ("gpt_neo", {}, PADDED),
    "logits times a factor": ("cohere", {"logit_scale": 0.25}, SHARED_WHOLE),
    "logits divided": ("granite", {"logits_scaling": 8.0}, SHARED_WHOLE),
    "parallel residuals": ("gpt_neox", {}, SHARED),
    "grouped queries": ("llama", {}, SHARED),
    "norms of queries and keys": ("qwen3", {}, SHARED),
    "ALiBi": ("bloom", {}, PADDED),
    "a state-space model": ("mamba", {}, PADDED),
    "state-space and attention layers": ("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 2}, PADDED),
    "only the attention layers of such a model": ("granitemoehybrid", {"layer_types": ["attention"] * 4}, SHARED),
    "linear attention": ("qwen3_next", {}, PADDED),
    "experts": ("mixtral", {}, SHARED),
    "experts, windows and sinks": ("gpt_oss", {}, PADDED),
    "latent attention": ("deepseek_v3", {}, SHARED),
    "a decoder of an encoder-decoder": ("bart", {}, PADDED_WHOLE),
    "an encoder used as a decoder": ("bert", {"is_decoder": True}, None),
    "an encoder": ("bert", {}, UserError),
    "a prompt that sees the response": ("cpmant", {}, UserError),
    "predictions of several tokens at once": ("prophetnet", {}, UserError),
    "random routing": ("phimoe", {}, UserError),
}
BY_DEFAULT = [  # run by default: each decision, with one or two architectures that lead to it
    "a cap on logits", "windows by place in the row", "parallel residuals", "ALiBi", "linear attention", "experts",
    "a decoder of an encoder-decoder", "an encoder used as a decoder", "an encoder", "random routing",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("exact", mark_exhaustive_except([True, False], True), ids=["exact", "bfloat16"])
@pytest.mark.parametrize("name", mark_exhaustive_except(DECISIONS, *BY_DEFAULT))
def test_each_architecture_gets_its_fastest_correct_layout(name, exact):
    model_type, overrides, decision = DECISIONS[name]
    model = tiny_model(model_type, **overrides)
    model.to(torch.bfloat16 if not exact else torch.float32 if model_type in IN_FLOAT32 else torch.float64)
    if decision is UserError:
        with pytest.raises(UserError):
            check_model(model, SHORT)
        return
    layout, message = check_model(model, SHORT)
    assert decision is None or replace(layout, whole_logits=decision.whole_logits) == decision, message
    # a base model may return float32, which the output head then rounds to 16 bits
    assert decision is None or layout.whole_logits is decision.whole_logits or (not exact and layout.whole_logits)
    if exact:
        differences = compare(model, layout)
        assert differences["nats"] < 0.01
        assert differences["gradient"] < 1e-3
