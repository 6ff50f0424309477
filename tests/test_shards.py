"""Tensors saved in parts: what each worker writes, resharding, and the model's files that are made of the parts."""

import contextlib
import copy
import io
import itertools
import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_strategies import make_model, split
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import export
from basics.checksums import write_checksums
from basics.files import sha256
from checkpointing import model_files
from checkpointing.archives import load_fitting
from checkpointing.checkpoints import _as_loaded, check_shared
from checkpointing.optimizer_state import _add_saved_tensors, _sharded
from checkpointing.sharded import (
    Box,
    ShardedCheckpoint,
    boxes_to_write,
    held_boxes,
    shard_of,
    without_tensors,
    write_shard,
)
from distributed.collectives import all_gather_object
from distributed.dtensor import distribute_like, distribute_model
from utils import UserError

# ---- the part that a worker holds and writes ------------------------------------------------------------------------

PLACEMENTS = [  # mesh, placements
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((4,), [Replicate()]),
    ((4,), [_StridedShard(1, split_factor=3)]),  # fused q, k and v
    ((2, 2), [Replicate(), Shard(0)]),  # two replicas
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Shard(0), Replicate()]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),  # FSDP of rows that tensor parallelism has split
    ((2, 2), [Shard(0), _StridedShard(1, split_factor=3)]),
    ((2, 2), [Replicate(), Replicate()]),
]


def check_pieces():
    """Check the pieces of a tensor that doesn't divide evenly; the value of each element is its index."""
    full = torch.arange(7 * 12).reshape(7, 12)
    for shape, placements in PLACEMENTS:
        mesh = init_device_mesh("cpu", shape)
        tensor = distribute_tensor(full, mesh, placements, src_data_rank=None)
        local = tensor.to_local()
        for box in (*held_boxes(tensor), *boxes_to_write(tensor)):
            place = tuple(slice(begin, begin + size) for begin, size in zip(box.offset, box.shape, strict=True))
            assert torch.equal(local[box.slices], full[place]), placements
        assert sum(local[box.slices].numel() for box in held_boxes(tensor)) == local.numel(), placements
        written = torch.cat([full[:0, 0], *(local[box.slices].flatten() for box in boxes_to_write(tensor))])
        everything = torch.cat(all_gather_object(written))
        assert sorted(everything.tolist()) == full.flatten().tolist(), placements
        if all(isinstance(placement, Replicate) for placement in placements):
            assert 0 < len(written) < 40  # replicas divide the work


def test_overlap_of_boxes_keeps_its_position_in_each_tensor():
    held = Box(offset=(2, 0), shape=(4, 3), start=(1, 0))  # rows 2 to 5, from row 1 of the local tensor on
    saved = Box(offset=(4, 1), shape=(9, 1), start=(0, 0))  # rows 4 to 12 of column 1
    assert held.overlap(saved) == Box((4, 1), (2, 1), start=(3, 1))
    assert saved.overlap(held) == Box((4, 1), (2, 1), start=(0, 0))
    assert held.overlap(Box((6, 0), (1, 3), (0, 0))) is None


def test_pieces_of_every_placement_cover_a_tensor_once(in_workers):
    in_workers(4, check_pieces)


def check_unshared_directory(directory: str):
    """Check that every worker refuses a directory that only rank 0 sees."""
    if dist.get_rank() > 0:
        directory += "/elsewhere"
    message = r"worker 1 doesn't see it\. .* a file system that all machines share; checkpoint_format=whole"
    with pytest.raises(UserError, match=f"local_run_dir={directory}: {message}"):
        check_shared(directory)
    with pytest.raises(OSError, match=message):
        write_shard(directory, shard_of({"policy": {"weight": torch.ones(2)}}, copies=False), None)


def test_directory_that_another_worker_does_not_see_is_refused(in_workers, tmp_path):
    in_workers(4, check_unshared_directory, str(tmp_path))


# ---- resharding -----------------------------------------------------------------------------------------------------


def take_step(model: nn.Module) -> torch.optim.Optimizer:
    """Take a step with the same gradient however the model is distributed; return the optimizer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=False)
    for number, parameter in enumerate(parameters):
        torch.manual_seed(number)
        parameter.grad = distribute_like(parameter, torch.randn(parameter.shape)).clone()
    optimizer.step()
    return optimizer


def state_dicts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {"policy": dict(model.state_dict(keep_vars=True)), "optimizer": optimizer.state_dict()}


def flat(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return all tensors by name, whole."""
    of_optimizer = optimizer.state_dict()["state"]
    tensors = dict(model.state_dict()) | {
        f"{number}.{key}": value for number, values in of_optimizer.items() for key, value in values.items()
    }
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in tensors.items()}


def load(checkpoint: ShardedCheckpoint, rest: dict, model: nn.Module, optimizer: torch.optim.Optimizer):
    load_fitting(checkpoint.state_dict("policy"), model, "test")
    state = copy.deepcopy(rest)
    _add_saved_tensors(state, checkpoint)
    optimizer.load_state_dict(_sharded(state, optimizer))


def distributed(name: str, mesh: str) -> nn.Module:
    return distribute_model(make_model(name) if dist.get_rank() == 0 else None, lambda model: split(model, mesh))


MESHES = ["fsdp", "hybrid", "tensor parallel", "2 x 2"]


def reshard(name: str, directory: str):
    """Write a checkpoint of a model distributed over each mesh, and load each checkpoint on every mesh."""
    expected_model = make_model(name)
    expected = flat(expected_model, optimizer := take_step(expected_model))
    rest = without_tensors(optimizer.state_dict())
    models = {mesh: distributed(name, mesh) for mesh in MESHES}
    optimizers = {mesh: take_step(model) for mesh, model in models.items()}
    for mesh in MESHES:
        path = os.path.join(directory, f"{name}-{mesh}".replace(" ", "-"))
        os.makedirs(path, exist_ok=True)
        before = flat(models[mesh], optimizers[mesh])
        for key, value in before.items():
            assert torch.equal(value, expected[key]), (mesh, key)
        write_shard(path, shard_of(state_dicts(models[mesh], optimizers[mesh]), copies=False), None)
        dist.barrier()
        for other, model in models.items():
            with torch.no_grad():
                for tensor in itertools.chain(
                    model.parameters(), *(values.values() for values in optimizers[other].state.values())
                ):
                    tensor.zero_()
            load(ShardedCheckpoint(path), rest, model, optimizers[other])
            for key, value in flat(model, optimizers[other]).items():
                assert torch.equal(value, expected[key]), (mesh, other, key)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["fused", "tied", "lora"])
def test_state_is_the_same_after_resharding(name, in_workers, tmp_path):
    in_workers(4, reshard, name, str(tmp_path))
    model = make_model(name)
    expected = flat(model, optimizer := take_step(model))
    rest = without_tensors(optimizer.state_dict())
    n_bytes = sum(tensor.nbytes for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    for path in tmp_path.iterdir():
        other = make_model(name)
        other_optimizer = take_step(other)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        load(checkpoint := ShardedCheckpoint(str(path)), rest, other, other_optimizer)
        assert all(torch.equal(value, expected[key]) for key, value in flat(other, other_optimizer).items())
        saved = sum(tensor.full().nbytes for tensor in checkpoint.state_dict("policy").values())
        assert saved <= n_bytes  # tied weights are saved once
        sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
        assert len(sizes) == 4
        if path.name != f"{name}-tensor-parallel":  # tensor parallelism replicates much of an adapter
            assert max(sizes) < 1.5 * min(sizes)  # each worker writes its share


# ---- files for from_pretrained -------------------------------------------------------------------------------------

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {  # config; True if the model can be written in several files
    "tied": (transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), True),
    "experts that files hold one by one": (transformers.MixtralConfig(**SIZES, num_local_experts=4), True),
    "q, k and v that files hold fused": (transformers.HrmTextConfig(**SIZES), False),
}


def run_export(run_dir: Path, checkpoint: str, output: Path) -> Path:
    export.run(OmegaConf.create({"run": str(run_dir), "checkpoint": checkpoint, "output": str(output)}))
    return output


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a model's files, each of which must be in the file that the index names."""
    files = {path.name: load_file(path) for path in directory.glob("model*.safetensors")}
    tensors = {name: tensor for file in files.values() for name, tensor in file.items()}
    if len(files) > 1:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert index["weight_map"] == {name: file for file, held in files.items() for name in held}
    return tensors


@pytest.mark.parametrize("kind", CONFIGS)
def test_model_written_file_by_file_is_the_one_that_save_pretrained_writes(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "MAX_FILE_SIZE", 20_000)
    torch.manual_seed(0)
    config, has_several_files = CONFIGS[kind]
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "expected")
    (tmp_path / "run/LATEST").mkdir(parents=True)
    model.config.save_pretrained(tmp_path / "run/LATEST")
    write_shard(str(tmp_path / "run/LATEST"), shard_of({"policy": dict(model.state_dict(keep_vars=True))}, False), None)
    for name, content in (("state.json", "{}"), ("../config.yaml", "{}")):
        (tmp_path / "run/LATEST" / name).write_text(content)
    write_checksums(str(tmp_path / "run/LATEST"))
    monkeypatch.setattr(export, "write_card", lambda *_, **__: None)
    run_export(tmp_path / "run", "LATEST", tmp_path / "exported")
    found, expected = tensors_in(tmp_path / "exported"), tensors_in(tmp_path / "expected")
    assert (tmp_path / "exported/model.safetensors").exists() is not has_several_files
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def write_model_files(name: str, mesh: str, directory: str) -> tuple[list[str], dict[str, str], str]:
    """Write shards, then the model's files with a full disk on one worker, and then without.

    Returns: the names of the files after the failure, the files' digests, the warning
    """
    model_files.MAX_FILE_SIZE = 10_000
    model = distributed(name, mesh)
    write_shard(directory, shard_of({"policy": dict(model.state_dict(keep_vars=True))}, copies=False), None)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 2:
            patch.setattr(model_files, "save_file", full)
        assert model_files.add_model_files(directory, _as_loaded(model), None, "do it later") == {}
        dist.barrier()
        names = os.listdir(directory)
        dist.barrier()
    return names, model_files.add_model_files(directory, _as_loaded(model), None, "do it later"), output.getvalue()


@pytest.mark.parametrize(("name", "mesh"), [("tied", "2 x 2"), ("fused", "fsdp")])
def test_workers_write_the_model_together_or_leave_it_out(name, mesh, in_workers, tmp_path):
    results = in_workers(4, write_model_files, name, mesh, str(tmp_path))
    shards = [f"shard-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    assert all(sorted(names) == [*shards, "shards.json"] for names, _, _ in results)
    assert re.fullmatch(r"WARNING: .*worker 2: .*No space left on device\); do it later\n", results[0][2])
    digests = results[0][1]
    assert len(digests) > 4 and digests == {path: sha256(tmp_path / path) for path in digests}
    expected = make_model(name).state_dict()
    found = tensors_in(tmp_path)
    assert expected.keys() - found.keys() == {"lm_head.weight"}  # both models tie it to the embedding
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
