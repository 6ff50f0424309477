"""Models split over 2 and 4 workers (real processes) equal the same models unsplit, in float64."""

import copy
import functools
import importlib
import math
import re

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import mark_exhaustive_except
from peft import LoraConfig, get_peft_model
from test_shared_prompt import SMALL, DoubleTorch, assert_same, make_batch, make_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.profiler import profile

from acceleration import response_head
from acceleration.prefix_sharing import padded_rows, shared_rows
from acceleration.response_head import chunked_token_logps
from distributed.strategies import TensorParallel
from distributed.tensor_parallel import parallelize
from utils import UserError

response_logps = functools.partial(response_head.response_logps, strategy=TensorParallel)

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
ALL_HEADS = {**SIZES, "num_key_value_heads": 8}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64}
CONFIGS = {  # a vocabulary of 61 doesn't divide evenly
    "gpt2": transformers.GPT2Config(**SMALL, **GPT2_SIZES),
    "gpt2_untied": transformers.GPT2Config(**SMALL, **GPT2_SIZES, tie_word_embeddings=False),
    "gptj": transformers.GPTJConfig(**SMALL, **GPT2_SIZES, rotary_dim=4),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, **SIZES),
    "llama": transformers.LlamaConfig(**SMALL, **ALL_HEADS),
    "llama3": transformers.LlamaConfig(**{**SMALL, "pad_token_id": 7}, **SIZES),
    "qwen3": transformers.Qwen3Config(**SMALL, **SIZES, head_dim=8, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SMALL, **SIZES, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SMALL, **SIZES, sliding_window=None),
    "phi3": transformers.Phi3Config(**SMALL, **SIZES),
}
ODD_CONFIGS = {
    "six heads": transformers.LlamaConfig(**SMALL, **{**ALL_HEADS, "hidden_size": 24, "num_attention_heads": 6}),
    "two key-value heads": transformers.LlamaConfig(**SMALL, **{**SIZES, "num_key_value_heads": 2}),
    "no plan": transformers.OPTConfig(
        **SMALL, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "experts": transformers.MixtralConfig(**SMALL, **SIZES, num_local_experts=2),
}
BATCH = make_batch((9, 4, 7), (3, 6, 2), (12, 1, 5))
TOLERANCE = 1e-10
FEW = [
    (2, name) for name in ("gpt2", "phi3", "qwen3")
]  # fused q, k and v; fused gate and up projections, too; norms per head
ALL = mark_exhaustive_except(((n, name) for n in (2, 4) for name in CONFIGS), lambda case: case in FEW)
MOST = mark_exhaustive_except(
    [*((2, name) for name in ("gpt2", "gptj", "gpt_neox", "llama3", "qwen3", "phi3")), (4, "gpt2"), (4, "qwen3")],
    (2, "gpt2"),
    (2, "qwen3"),
)
SOME = mark_exhaustive_except([(2, "qwen3"), (4, "gpt2")], (2, "qwen3"))
MODEL_MODULES = [  # most compute parts in float32, whatever their dtype
    f"transformers.models.{name}.modeling_{name}"
    for name in ("gpt2", "gptj", "gpt_neox", "llama", "qwen3", "qwen2", "mistral", "phi3")
]


def prepare_worker():
    """Make the models compute everything in float64."""
    for name in MODEL_MODULES:
        importlib.import_module(name).torch = DoubleTorch()


# ---- functions that run in the workers ------------------------------------------------------------------------------


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def dense_and_split(name: str, dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a model, and the same model split over the workers."""
    models = make_model(CONFIGS[name], dtype), make_model(CONFIGS[name], dtype)
    parallelize(models[1], mesh_of_all())
    return models


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def outputs_and_gradients(model: nn.Module, rows: str) -> dict[str, torch.Tensor]:
    """Return the batch's log-probabilities, or all logits, and the gradient of a random weighting of them."""
    if rows == "logits":
        outputs = model(BATCH["chosen_input_ids"], attention_mask=BATCH["chosen_attention_mask"]).logits
    else:
        outputs = response_logps(model, {"padded": padded_rows, "shared": shared_rows}[rows](BATCH))
    model.zero_grad()
    (outputs * torch.rand(outputs.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"logps": outputs.detach(), **gradients}


def check_equals_dense(name: str, checkpointing: bool = False):
    models = dense_and_split(name)
    for model in models if checkpointing else ():
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for rows in ("logits", "padded", "shared"):
        dense, split = (outputs_and_gradients(model, rows) for model in models)
        assert split.keys() == {"logps", *(n for n, _ in models[0].named_parameters())}
        assert_same(split, dense, TOLERANCE)


def check_parameters(name: str):
    """Split a model without values, give it the dense model's, and check that it returns them bit for bit.

    Each worker must hold only its share.
    """
    dense = make_model(CONFIGS[name])
    split = copy.deepcopy(dense)
    on_meta = {p: nn.Parameter(p.to("meta")) for p in split.parameters()}
    for module in split.modules():
        module._parameters.update({n: on_meta[p] for n, p in module._parameters.items() if p is not None})
    parallelize(split, mesh_of_all())
    values, given = dense.state_dict(), {}
    for parameter_name, parameter in split.named_parameters(remove_duplicate=False):
        assert parameter.is_meta
        value = values[parameter_name]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        owner, _, attribute = parameter_name.rpartition(".")
        setattr(split.get_submodule(owner), attribute, given.setdefault(parameter, nn.Parameter(value)))

    tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert (split.get_input_embeddings().weight is split.get_output_embeddings().weight) == tied
    assert [n for n, _ in split.named_parameters()] == [n for n, _ in dense.named_parameters()]
    assert list(split.state_dict()) == list(values)
    assert all(torch.equal(full(value), values[n]) for n, value in split.state_dict().items())

    for parameter_name, parameter in split.named_parameters():
        if isinstance(parameter, DTensor):
            kept = parameter.to_local().untyped_storage().nbytes() / parameter.itemsize
            assert kept <= parameter.numel() / dist.get_world_size() * 1.1 or "embed" in parameter_name
        else:
            assert parameter.ndim == 1 or parameter_name == "transformer.wpe.weight"  # norms and biases after a sum
    ids = BATCH["chosen_input_ids"]
    assert torch.allclose(split(ids).logits, dense(ids).logits, rtol=TOLERANCE)


def check_generation(name: str):
    dense, split = dense_and_split(name)
    prompt = BATCH["chosen_input_ids"][:, :5]
    for sampling in ({"do_sample": False}, {"do_sample": True, "top_k": 20}):
        texts = []
        for model in (dense, split):
            torch.manual_seed(3)
            mask = torch.ones_like(prompt)
            texts.append(model.generate(prompt, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **sampling))
        assert torch.equal(*texts)
        assert len(texts[0].unique()) > 4
    with torch.no_grad():
        logits = split(prompt).logits
    everyones = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, logits)
    assert all(torch.equal(logits, other) for other in everyones)


def with_adapters(model: nn.Module, name: str) -> nn.Module:
    """Return the model with two non-zero adapters in every linear layer of its blocks."""
    torch.manual_seed(4)
    config = LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=name.startswith("gpt2"))
    model = get_peft_model(model, config)
    model.add_adapter("reference", config)
    for n, parameter in model.named_parameters():
        if "lora_" in n:
            nn.init.normal_(parameter, 0, 0.3)
    return model


def check_adapters(name: str):
    models = [with_adapters(make_model(CONFIGS[name]), name) for _ in range(2)]
    parallelize(models[1], mesh_of_all())
    matrices = {n: p for n, p in models[1].named_parameters() if "lora_" in n}
    # A or B of each adapter is split, except in fused layers
    n_split = sum(isinstance(p, DTensor) or "c_attn.lora_B" in n for n, p in matrices.items())
    assert 2 * n_split == len(matrices)
    outputs = []
    for adapter in ("default", "reference"):
        for model in models:
            model.set_adapter(adapter)
        dense, split = (outputs_and_gradients(model, "shared") for model in models)
        assert len(split) > 1
        assert all(adapter in n for n in split if n != "logps")
        assert_same(split, dense, TOLERANCE)
        outputs.append(split["logps"])
    with models[0].disable_adapter(), models[1].disable_adapter(), torch.no_grad():
        dense, split = (response_logps(model, padded_rows(BATCH)) for model in models)
        outputs.append(split)
        assert torch.allclose(split, dense, rtol=TOLERANCE)
    assert len({round(float(logps[0]), 3) for logps in outputs}) == 3


def check_training(name: str, optimizer: str):
    """Take three steps, with gradients accumulated over two microbatches."""
    models = dense_and_split(name)
    for model in models:
        update = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3)
        for _ in range(3):
            for rows_of in (padded_rows, shared_rows):
                (response_logps(model, rows_of(BATCH)) * torch.linspace(-1, 1, 6)).sum().backward()
            update.step()
            update.zero_grad()
    start = dict(make_model(CONFIGS[name]).named_parameters())
    dense, split = ({n: full(p).detach() - start[n] for n, p in model.named_parameters()} for model in models)
    assert all(value.abs().max() > 1e-3 for value in split.values())
    assert_same(split, dense, 1e-6)  # RMSprop and Adam divide by gradients near zero


def check_autocast(name: str):
    models = dense_and_split(name, torch.float32)
    dtypes = {}, {}  # of each module's output, in both models
    for model, ours in zip(models, dtypes, strict=True):
        for n, module in model.named_modules():
            module.register_forward_hook(lambda _m, _i, out, n=n, ours=ours: ours.update({n: getattr(out, "dtype", 0)}))
    with torch.autocast("cpu", torch.bfloat16):
        dense, split = (outputs_and_gradients(model, "shared") for model in models)
    assert {n: dtype for n, dtype in dtypes[0].items() if n in dtypes[1]} == dtypes[1]
    assert torch.bfloat16 in dtypes[1].values()
    assert all(p.grad.dtype == torch.float32 for p in models[1].parameters())
    assert_same(split, dense, 0.05)


def check_chunks(name: str):
    """Check with the output head in chunks of a few tokens, whose logits are recomputed in the backward pass."""
    sizes = response_head._CHUNK_BYTES["cpu"], response_head._KEPT_LOGITS_BYTES
    response_head._CHUNK_BYTES["cpu"], response_head._KEPT_LOGITS_BYTES = 4 * 61 * 5, 0
    try:
        check_equals_dense(name)
    finally:
        response_head._CHUNK_BYTES["cpu"], response_head._KEPT_LOGITS_BYTES = sizes


def check_large_logits(name: str):
    """Check with logits of several thousand, which would overflow if exponentiated."""
    models = dense_and_split(name)
    for model in models:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1e3)
    dense, split = (outputs_and_gradients(model, "padded") for model in models)
    assert dense["logps"].max() < -1e3
    assert_same(split, dense, 1e-9)


def numbers_sent(name: str) -> tuple[int, int]:
    """Return the number of tokens, and the number of tensor elements sent to compute their log-probabilities."""
    _, split = dense_and_split(name)
    rows = padded_rows(BATCH)
    hidden_states, head = torch.randn(len(rows.targets), 32).double(), split.get_output_embeddings()
    with profile(record_shapes=True) as events, torch.no_grad():
        chunked_token_logps(hidden_states, head, rows.targets, 61, TensorParallel)
    shapes = [e.input_shapes[0] for e in events.events() if e.name.startswith("_c10d_functional::all")]
    return len(rows.targets), sum(math.prod(shape) for shape in shapes)


def count_all_reduces(name: str) -> tuple[int, int]:
    """Count the all-reduces of the model without its head, forward and backward."""
    _, split = dense_and_split(name)
    with profile() as forward:
        hidden_states = split.base_model(BATCH["chosen_input_ids"])[0]
    with profile() as backward:
        hidden_states.sum().backward()
    return tuple(sum(e.name == "_c10d_functional::all_reduce" for e in p.events()) for p in (forward, backward))


def error_of(name: str, adapter: dict | None = None) -> str:
    model = transformers.AutoModelForCausalLM.from_config((CONFIGS | ODD_CONFIGS)[name])
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(**adapter))
    try:
        parallelize(model, mesh_of_all())
    except UserError as error:
        return str(error)


# ---- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_workers", "name"), ALL)
def test_outputs_and_gradients_equal_the_dense_models(n_workers, name, in_workers):
    in_workers(n_workers, check_equals_dense, name)


@pytest.mark.parametrize(("n_workers", "name"), MOST)
def test_activation_checkpointing_does_not_change_the_numbers(n_workers, name, in_workers):
    in_workers(n_workers, check_equals_dense, name, checkpointing=True)


@pytest.mark.parametrize(("n_workers", "name"), ALL)
def test_split_parameters_hold_a_share_and_gather_to_the_dense_values(n_workers, name, in_workers):
    in_workers(n_workers, check_parameters, name)


@pytest.mark.parametrize(("n_workers", "name"), MOST)
def test_generation_equals_that_of_the_dense_model(n_workers, name, in_workers):
    in_workers(n_workers, check_generation, name)


@pytest.mark.parametrize(("n_workers", "name"), MOST)
def test_adapters_equal_those_of_the_dense_model(n_workers, name, in_workers):
    in_workers(n_workers, check_adapters, name)


@pytest.mark.parametrize("optimizer", mark_exhaustive_except(["RMSprop", "AdamW"], "RMSprop"))
@pytest.mark.parametrize(("n_workers", "name"), SOME)
def test_training_equals_that_of_the_dense_model(n_workers, name, optimizer, in_workers):
    in_workers(n_workers, check_training, name, optimizer)


@pytest.mark.parametrize(("n_workers", "name"), MOST)
def test_autocast_equals_that_of_the_dense_model(n_workers, name, in_workers):
    in_workers(n_workers, check_autocast, name)


@pytest.mark.parametrize(("n_workers", "name"), SOME)
def test_recomputed_head_chunks_do_not_change_the_numbers(n_workers, name, in_workers):
    in_workers(n_workers, check_chunks, name)


@pytest.mark.parametrize(("n_workers", "name"), SOME)
def test_large_logits_do_not_overflow(n_workers, name, in_workers):
    in_workers(n_workers, check_large_logits, name)


@pytest.mark.parametrize(("n_workers", "name"), SOME)
def test_log_probabilities_send_three_numbers_per_token(n_workers, name, in_workers):
    for n_tokens, n_sent in in_workers(n_workers, numbers_sent, name):
        assert n_sent == 3 * n_tokens


@pytest.mark.parametrize(("name", "n_backward"), [("gpt2", 2), ("gptj", 1), ("llama3", 2)])
def test_block_needs_two_all_reduces_in_each_pass(name, n_backward, in_workers):
    """The embedding needs one more. GPT-J's attention and MLP read the same hidden states."""
    n_layers = 2
    assert set(in_workers(2, count_all_reduces, name)) == {(2 * n_layers + 1, n_backward * n_layers)}


@pytest.mark.parametrize(
    ("name", "adapter", "message"),
    [
        ("six heads", None, "4 workers can't split .*, which has num_attention_heads=6: use .* divides 6, or use"),
        ("two key-value heads", None, "num_key_value_heads=2: use a number of workers that divides 2, or use"),
        ("no plan", None, "OPTForCausalLM has no plan for tensor parallelism; use trainer=FSDPTrainer"),
        (
            "experts",
            None,
            r"Mixtral.*: .* needs .*rowwise for model\.layers\.\*\.mlp\.experts\.down_proj, moe_tp_experts for .*; use",
        ),
        ("llama", {"use_dora": True}, "its layer model.layers.0.self_attn.q_proj is of the class peft.*Linear; "),
        (
            "llama",
            {"target_modules": ["embed_tokens"]},
            "its layer model.embed_tokens is of the class peft.*Embedding; ",
        ),
    ],
)
def test_model_that_cannot_be_split_is_refused_with_a_remedy(name, adapter, message, in_workers):
    for error in in_workers(4, error_of, name, adapter):
        assert re.search(message, error)
