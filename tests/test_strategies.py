"""Models distributed over workers, in real processes connected by gloo."""

import copy

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import mark_exhaustive_except
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from config_checks.checks import NOT_FOR_DTENSORS
from distributed.dtensor import clip_grad_norm, distribute_like, distribute_model, full_state_dict, full_tensor
from distributed.fsdp import make_meshes, shard_model
from distributed.tensor_parallel import parallelize
from utils import UserError

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "tied": transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "untied": transformers.GPTNeoXConfig(**SIZES),
    "lora": transformers.LlamaConfig(**SIZES),
    "fused": transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0,
                                     eos_token_id=0),
}  # fmt: skip


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if name == "lora" else model


def split(model: nn.Module, mesh_name: str):
    if mesh_name == "tensor parallel":
        parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        return
    mesh, tensor_mesh = make_meshes(2 if mesh_name == "hybrid" else 1, 2 if mesh_name == "2 x 2" else 1)
    if tensor_mesh is not None:
        parallelize(model, tensor_mesh)
    shard_model(model, mesh, None, None, offload=False)


def check_distribution(name: str, mesh_name: str) -> dict[str, tuple[int, int]]:
    """Distribute a model that only the first worker has; return each parameter's (local, total) number of elements."""
    expected = make_model(name)
    given = copy.deepcopy(expected) if dist.get_rank() == 0 else None
    placed = distribute_model(given, lambda model: split(model, mesh_name))
    assert given is None or not any(parameter.numel() for parameter in given.parameters())
    state, expected_state = full_state_dict(dict(placed.state_dict(keep_vars=True))), expected.state_dict()
    assert list(state) == list(expected_state)
    for key, tensor in state.items():
        assert (
            tensor is None
            if dist.get_rank() > 0 and isinstance(placed.get_parameter(key), DTensor)
            else torch.equal(tensor, expected_state[key])
        )
    for (key, buffer), (expected_key, expected_buffer) in zip(
        placed.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert key == expected_key and torch.equal(buffer, expected_buffer)
    parameters = dict(placed.named_parameters())
    assert {key: p.requires_grad for key, p in parameters.items()} == {
        key: p.requires_grad for key, p in expected.named_parameters()
    }
    if name == "tied":
        assert placed.get_input_embeddings().weight is placed.get_output_embeddings().weight
    return {
        key: (p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel()) for key, p in parameters.items()
    }


MESHES = [("fsdp", 2, 2), ("fsdp", 4, 4), ("hybrid", 4, 2), ("tensor parallel", 2, 2)]  # name, workers, shards


@pytest.mark.parametrize(
    ("name", "mesh_name", "n_workers", "n_shards"),
    mark_exhaustive_except(
        ((name, *mesh) for name in ("tied", "untied", "lora") for mesh in MESHES),
        lambda case: case[2] == 2 and case[0] != "untied",
    ),
)
def test_model_of_one_worker_is_distributed_over_all(name, mesh_name, n_workers, n_shards, in_workers):
    for sizes in in_workers(n_workers, check_distribution, name, mesh_name):
        spread = {key: size for key, size in sizes.items() if mesh_name != "tensor parallel" or size[0] < size[1]}
        local, total = (sum(size[i] for size in spread.values()) for i in (0, 1))
        assert total >= 0.9 * sum(size[1] for size in sizes.values())
        assert local == pytest.approx(total / n_shards, rel=0.05)  # 61 tokens don't divide evenly


def check_unknown_blocks():
    with pytest.raises(UserError, match=r"GPTNeoXForCausalLM doesn't name its transformer blocks; give .*block_name"):
        shard_model(make_model("untied"), make_meshes(1)[0], "Blocks", None, offload=False)


def test_model_without_known_blocks_is_refused(in_workers):
    in_workers(1, check_unknown_blocks)


def check_clipping(max_norm: float):
    """Clip gradients, some sharded on two meshes and some whole; compare with clipping whole copies of all."""
    torch.manual_seed(0)
    mesh, other_mesh = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    dense = [nn.Parameter(torch.randn(5, 6, dtype=torch.float64)) for _ in range(4)]
    spread = [
        nn.Parameter(distribute_tensor(dense[0].detach(), mesh, [Shard(0)])),
        nn.Parameter(distribute_tensor(dense[1].detach(), mesh, [Shard(1)])),
        nn.Parameter(distribute_tensor(dense[2].detach(), other_mesh, [Shard(0), Shard(0)])),
        nn.Parameter(dense[3].detach().clone()),
    ]
    for parameter, placed in zip(dense, spread, strict=True):
        parameter.grad = torch.randn_like(parameter)
        placed.grad = distribute_like(placed, parameter.grad).clone()
    expected = nn.utils.clip_grad_norm_(dense, max_norm).item()
    assert clip_grad_norm([*spread, nn.Parameter(torch.ones(3))], max_norm).item() == pytest.approx(expected, rel=1e-12)
    for parameter, placed in zip(dense, spread, strict=True):
        torch.testing.assert_close(full_tensor(placed.grad), parameter.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_uses_the_norm_of_the_whole_gradient(max_norm, in_workers):
    in_workers(2, check_clipping, max_norm)


def optimizers() -> dict[str, type]:
    base = torch.optim.Optimizer
    found = {k: v for k, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, base)}
    # the base class; two that need another call or other gradients; one that takes 2-D tensors only
    return {k: v for k, v in found.items() if k not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")}


def failing_optimizers() -> list[str]:
    """Return the optimizers that fail on sharded parameters; check that all others update them like whole ones."""
    mesh, failing = init_device_mesh("cpu", (2,)), []
    for name, optimizer_class in optimizers().items():
        torch.manual_seed(0)
        dense = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((8, 6), (5,), (4, 3))]
        spread = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in dense[:2]]
        spread.append(nn.Parameter(dense[2].detach().clone()))
        optimizer, spread_optimizer = optimizer_class(dense, lr=0.01), optimizer_class(spread, lr=0.01)
        try:
            for _ in range(3):
                for parameter, placed in zip(dense, spread, strict=True):
                    parameter.grad = torch.randn_like(parameter)
                    placed.grad = distribute_like(placed, parameter.grad)
                optimizer.step()
                spread_optimizer.step()
        except RuntimeError:
            failing.append(name)
            continue
        for parameter, placed in zip(dense, spread, strict=True):
            torch.testing.assert_close(full_tensor(placed.detach()), parameter.detach(), rtol=1e-12, atol=1e-12)
    return failing


def test_every_allowed_optimizer_updates_sharded_parameters_like_whole_ones(in_workers):
    for failing in in_workers(2, failing_optimizers):
        assert sorted(failing) == sorted(NOT_FOR_DTENSORS)
