"""Each worker reads only its part of a model's safetensors files, and gets the weights that `from_pretrained` loads."""

import os

import pytest
import torch
import transformers
from conftest import ORACLE, mark_exhaustive_except, save_models
from safetensors.torch import load_file, save_file

import checkpointing.unread  # noqa: F401 (in the process that workers are forked from)
from checkpointing.archives import load_pretrained
from checkpointing.sharded import TensorFiles
from commands.command_line import compose_config
from distributed.dtensor import full_tensor
from distributed.strategies import STRATEGIES
from models import load_model
from references import policy_source
from utils import UserError

SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA, TIED = {**SIZES, "num_key_value_heads": 2}, {"tie_word_embeddings": True}
GPT2 = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "qwen2 with tied weights": transformers.Qwen2Config(**LLAMA, **TIED),
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2 as on the hub": transformers.GPT2Config(**GPT2),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES),
    "gpt_neox as on the hub": transformers.GPTNeoXConfig(**SIZES),
    "mixtral with a tensor per expert": transformers.MixtralConfig(**LLAMA, num_local_experts=2),
    "qwen2 with both of two tied weights": transformers.Qwen2Config(**LLAMA, **TIED),
    "gpt2 in a pickle": transformers.GPT2Config(**GPT2),
}
DEFAULT = ("llama", "gpt2 as on the hub", "mixtral with a tensor per expert")
READ_WHOLE = ("mixtral with a tensor per expert", "qwen2 with both of two tied weights", "gpt2 in a pickle")
FSDP, TENSOR = "trainer=FSDPTrainer", "trainer=TensorParallelTrainer"


def as_on_the_hub(name: str, state: dict) -> dict:
    """Rename and add tensors, so that the file looks like the one on the hub."""
    if name == "gpt2 as on the hub":
        buffers = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for layer in range(2)}
        return {key.removeprefix("transformer."): value for key, value in state.items()} | buffers
    if name == "gpt_neox as on the hub":
        state["embed_out.weight"] = state.pop("embed_out.weight", state.pop("lm_head.weight", None))
        prefix = "gpt_neox.layers.0.attention."
        buffers = {f"{prefix}rotary_emb.inv_freq": torch.ones(4), f"{prefix}masked_bias": torch.tensor(-1e9)}
        return {key: value.half() for key, value in state.items()} | buffers
    if name == "qwen2 with both of two tied weights":
        return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    return state


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Save a model for each of `CONFIGS`, most of them in several files; return their directories."""
    paths = save_models(CONFIGS, tmp_path_factory.mktemp("models"))
    for name, path in paths.items():
        file = os.path.join(path, "model.safetensors")
        state = as_on_the_hub(name, load_file(file))
        os.remove(file)
        if name == "gpt2 in a pickle":
            torch.save(state, os.path.join(path, "pytorch_model.bin"))
        elif "hub" in name or "both" in name:
            save_file(state, file, metadata={"format": "pt"})
        else:
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
            model.save_pretrained(path, max_shard_size="60KB")
    return paths


def loaded_in_workers(path: str, words: list[str], is_policy: bool, expected: dict, buffers: dict) -> tuple[bool, int]:
    """Load a model in all workers and compare it; return True if any were unread at first, and the bytes read."""
    config = compose_config("model=blank_model", "datasets=[toy]", "loss=dpo", f"model.name_or_path={path}", *words)
    read, n_bytes = TensorFiles.read, 0

    def counted(self, *args) -> torch.Tensor:
        nonlocal n_bytes
        part = read(self, *args)
        n_bytes += part.nbytes
        return part

    strategy, model = STRATEGIES[config.trainer](config), None
    if os.environ["LOCAL_RANK"] == "0":
        model = load_model(config, config.model.policy_dtype, strategy.device_map, policy_source(config))
    is_unread = hasattr(model, "unread")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFiles, "read", counted)
        model = strategy.distribute(model, is_policy)
    state = {name: full_tensor(parameter.detach()) for name, parameter in model.named_parameters()}
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert not hasattr(model, "unread")
    return is_unread, n_bytes


def state_and_buffers(path: str, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    model = load_pretrained(path, "test", dtype=dtype)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("name", mark_exhaustive_except(CONFIGS, *DEFAULT))
def test_weights_read_in_parts_are_those_of_from_pretrained(name, models, in_workers):
    state, buffers = state_and_buffers(models[name])
    n_in_files = sum(tensor.nbytes for tensor in state.values()) / (2 if name == "gpt_neox as on the hub" else 1)
    splits = [[FSDP], [TENSOR]] if name != "mixtral with a tensor per expert" else [[FSDP]]
    for words in splits:
        results = in_workers(2, loaded_in_workers, models[name], words, True, state, buffers)
        assert results[0][0] == (name not in READ_WHOLE), words
        for _, n_bytes in results:
            low, high = (0, 0) if name in READ_WHOLE else (0.45, 0.55 if words == [FSDP] else 0.7)
            assert low * n_in_files <= n_bytes <= high * n_in_files, words


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_workers_of_a_mesh_read_their_parts(name, models, in_workers):
    state, buffers = state_and_buffers(models[name])
    for words in ([FSDP, "tensor_parallel=2"], [FSDP, "fsdp_replicate=2"]):
        for is_unread, n_bytes in in_workers(4, loaded_in_workers, models[name], words, True, state, buffers):
            assert n_bytes < 0.65 * sum(tensor.nbytes for tensor in state.values()), is_unread


def test_reference_read_in_parts_is_cast_to_policy_dtype_before_policy_mp(models, in_workers):
    state, buffers = state_and_buffers(models["llama"], torch.float16)
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    words = [FSDP, "model.policy_dtype=float16", "model.policy_mp=bfloat16"]
    results = in_workers(2, loaded_in_workers, models["llama"], words, False, state, buffers)
    assert results[0][0]


def refused(path: str, words: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        loaded_in_workers(path, words, True, {}, {})
    return str(caught.value)


def test_every_worker_names_weights_that_are_not_finite(models, in_workers, tmp_path):
    state = load_file(ORACLE / "model" / "model.safetensors")
    first, last = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "gpt_neox.final_layer_norm.weight"
    state[first][-1, -1], state[last][0] = torch.nan, torch.inf  # held by different workers
    for file in (ORACLE / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = f"model.name_or_path={tmp_path}: weights that are NaN or infinite in float32: {first}, {last}"
    for message in in_workers(2, refused, str(tmp_path), [FSDP]):
        assert message == expected
