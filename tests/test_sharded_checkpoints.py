"""Checkpoints with a file of tensors from each worker: placements, resharding, resuming, and faults."""

import contextlib
import copy
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import mark_exhaustive_except, trainers_in
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_resume import assert_same_run, half_saved
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
from checkpointing.integrity import find_corruption
from checkpointing.optimizer_state import _add_saved_tensors, _sharded
from checkpointing.restoring import load_checkpoint, resume_training
from checkpointing.resume import find_checkpoints
from checkpointing.sharded import (
    Box,
    ShardedCheckpoint,
    boxes_to_write,
    held_boxes,
    shard_of,
    without_tensors,
    write_shard,
)
from commands.run_directory import create_run_dir
from distributed.collectives import all_gather_object
from distributed.dtensor import distribute_like, distribute_model
from trainers import BasicTrainer
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
    """Check the pieces of an uneven tensor by its values, which number its elements."""
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


def test_overlap_of_boxes_has_its_place_in_each_holder():
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


def reshard(name: str, meshes: list[str], directory: str):
    """Write a checkpoint of a model distributed over each mesh, and load each checkpoint on every mesh."""
    expected_model = make_model(name)
    expected = flat(expected_model, optimizer := take_step(expected_model))
    rest = without_tensors(optimizer.state_dict())
    models = {mesh: distributed(name, mesh) for mesh in meshes}
    optimizers = {mesh: take_step(model) for mesh, model in models.items()}
    for mesh in meshes:
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


HOWS = ["fsdp", "hybrid", "tensor parallel", "2 x 2"]


@pytest.mark.parametrize(
    ("name", "hows"),
    mark_exhaustive_except(
        [("fused", ["fsdp", "2 x 2"]), ("tied", HOWS), ("fused", HOWS), ("lora", HOWS)], ("fused", ["fsdp", "2 x 2"])
    ),
    ids=str,
)
def test_state_is_the_same_after_resharding(name, hows, in_workers, tmp_path):
    in_workers(4, reshard, name, hows, str(tmp_path))
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


# ---- runs -----------------------------------------------------------------------------------------------------------

RUN = [
    "model=tiny", "datasets=[toy]", "loss=dpo", "max_length=64", "max_prompt_length=32", "n_eval_examples=8",
    "eval_batch_size=4", "lr=1e-3", "warmup_steps=10", "eval_every=16", "save_every=8", "n_examples=32",
    "do_first_eval=false", "sample_during_eval=false", "keep_best=loss/eval", "keep_checkpoints=2",
]  # fmt: skip
ASYNC = ["checkpoint_format=sharded", "checkpoint_async=true"]


@pytest.fixture(scope="module")
def never_stopped(launcher) -> Path:
    """Run two workers that write sharded checkpoints asynchronously; return the run directory."""
    run_dir = launcher.directory / "never_stopped"
    code = launcher.run(*RUN, *ASYNC, "trainer=FSDPTrainer", f"local_run_dir={run_dir}", n_workers=2)
    assert code == 0, launcher.output
    return run_dir


def run_export(run_dir: Path, checkpoint: str, output: Path) -> Path:
    export.run(OmegaConf.create({"run": str(run_dir), "checkpoint": checkpoint, "output": str(output)}))
    return output


PLAIN = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")  # for from_pretrained


def test_sharded_checkpoints_hold_the_same_state_as_whole_ones(never_stopped, launcher, tmp_path):
    whole = tmp_path / "whole"
    assert launcher.run(*RUN, "trainer=FSDPTrainer", f"local_run_dir={whole}", n_workers=2) == 0, launcher.output
    assert sorted(os.listdir(never_stopped)) == sorted(os.listdir(whole))
    assert os.readlink(never_stopped / "BEST") == os.readlink(whole / "BEST")
    for name in PLAIN:  # at the end of a run
        assert (never_stopped / "LATEST" / name).read_bytes() == (whole / "LATEST" / name).read_bytes(), name
    index = json.loads((never_stopped / "LATEST/model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {"model.safetensors"}  # not the shards, which vLLM would read
    assert (never_stopped / "LATEST/README.md").exists() and not (never_stopped / "BEST/model.safetensors").exists()
    for checkpoint in ("LATEST", "BEST"):
        exported = run_export(never_stopped, checkpoint, tmp_path / f"exported-{checkpoint}")
        plain = run_export(whole, checkpoint, tmp_path / f"plain-{checkpoint}")
        assert sorted(os.listdir(exported)) == sorted(os.listdir(plain))
        for name in PLAIN:
            assert (exported / name).read_bytes() == (plain / name).read_bytes(), name
    state = torch.load(whole / "LATEST/optimizer.pt", weights_only=True)["state"]["state"]
    expected = {f"{number}.{key}": value for number, values in state.items() for key, value in values.items()}
    found = ShardedCheckpoint(str(never_stopped / "LATEST")).state_dict("optimizer")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor.full(), expected[name]) for name, tensor in found.items())


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(6))
def test_run_killed_while_it_writes_in_a_thread_ends_as_one_that_never_stopped(seed, never_stopped, launcher, tmp_path):
    rng, run_dir = random.Random(seed), tmp_path / "run"
    overrides = [*RUN, *ASYNC, "trainer=FSDPTrainer", f"local_run_dir={run_dir}", "resume=auto"]
    launcher.start(*overrides, n_workers=2)
    n_before = rng.randint(0, 2)  # complete checkpoints before the one that is cut off
    while len(re.findall("wrote .* MB", launcher.output)) < n_before or not half_saved(run_dir):
        assert launcher.runs[-1].is_running, launcher.output
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    launcher.kill(signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL, launcher.output
    assert launcher.run(*overrides, n_workers=2) == 0, launcher.output
    assert_same_run(run_dir, never_stopped)


# ---- files for from_pretrained -------------------------------------------------------------------------------------

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {  # config; True if the model can be written in several files
    "tied": (transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), True),
    "experts that files hold one by one": (transformers.MixtralConfig(**SIZES, num_local_experts=4), True),
    "q, k and v that files hold fused": (transformers.HrmTextConfig(**SIZES), False),
}


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


# ---- one process: LoRA, faults --------------------------------------------------------------------------------------

ALONE = [word for word in RUN if not word.startswith(("keep_", "n_examples", "save_every"))]
ALONE += ["n_examples=16", "save_every=8", "checkpoint_format=sharded"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[BasicTrainer, Path]:
    """Finish a run in one process; return its trainer and directory."""
    return train_and_save(trainers_in(tmp_path_factory.mktemp("finished")), *ALONE)


def train_and_save(make_trainer, *overrides: str) -> tuple[BasicTrainer, Path]:
    trainer = make_trainer(*overrides)
    create_run_dir(trainer.config)
    trainer.train()
    trainer.save()
    return trainer, Path(trainer.run_dir)


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """Copy the finished run's directory, which the test may change; return the copy."""
    return shutil.copytree(finished[1], tmp_path / "run", symlinks=True)


def test_adapter_is_saved_as_by_peft_and_its_optimizer_in_shards(make_trainer):
    overrides = [*ALONE, "lora={r:2}", "checkpoint_async=true"]
    trainer, run_dir = train_and_save(make_trainer, *overrides)
    names = os.listdir(run_dir / "step-8")
    assert {"adapter_model.safetensors", "README.md", "shards.json"} <= set(names) and "model.safetensors" not in names
    again = make_trainer(*overrides)
    resume_training(again, str(run_dir / "step-8"))
    again.train()
    for (name, parameter), expected in zip(again.policy.named_parameters(), trainer.policy.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


@pytest.mark.exhaustive
def test_moving_reference_is_saved_in_shards(make_trainer):
    overrides = [*ALONE, "reference_update_every=1", "reference_update_alpha=0.5", "model.reference_dtype=float32"]
    trainer, run_dir = train_and_save(make_trainer, *overrides)
    again = make_trainer(*overrides, "seed=1")
    load_checkpoint(again, str(run_dir / "LATEST"))
    for parameter, expected in zip(
        again.reference.model.parameters(), trainer.reference.model.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected)


def test_weights_of_a_sharded_checkpoint_start_a_new_run(finished, run_dir, make_trainer, monkeypatch):
    policy = make_trainer(*ALONE, f"model.archive={run_dir}/LATEST").policy
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), finished[0].policy.parameters(), strict=True))
    with pytest.raises(UserError, match=rf"no such file\. The checkpoint is sharded: give {run_dir}/LATEST"):
        make_trainer(*ALONE, f"model.archive={run_dir}/LATEST/policy.pt")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"The checkpoint is sharded: give \.$"):
        patch.chdir(f"{run_dir}/LATEST")
        make_trainer(*ALONE, "model.archive=policy.pt")
    policy = make_trainer(*ALONE, "model=blank_model", f"model.name_or_path={run_dir}/LATEST").policy
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), finished[0].policy.parameters(), strict=True))
    export_it = rf"python export\.py run={run_dir} checkpoint=step-8 output=DIR"
    with pytest.raises(UserError, match=rf"model\.name_or_path={run_dir}/step-8 is a sharded checkpoint.*{export_it}"):
        make_trainer(*ALONE, "model=blank_model", f"model.name_or_path={run_dir}/step-8")


SHARD = "shard-00001-of-00001.safetensors"


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda d: flip_a_bit(d / SHARD), f"{SHARD} doesn't match its checksum"),
        (lambda d: (d / "shards.json").write_text("{"), r"shards\.json doesn't match its checksum"),
    ],
    ids=["missing", "a bit flipped", "index cut off"],
)
def test_damaged_shard_is_named(damage, message, run_dir, make_trainer):
    damage(run_dir / "LATEST")
    with pytest.raises(UserError, match=message):
        find_checkpoints(str(run_dir), "LATEST")
    with pytest.raises(UserError, match=message.split(" ")[0]):
        make_trainer(*ALONE, f"model.archive={run_dir}/LATEST")


def edit_index(directory: Path, edit):
    index = json.loads((directory / "shards.json").read_text())
    edit(index)
    (directory / "shards.json").write_text(json.dumps(index))


WEIGHT = "policy.gpt_neox.embed_in.weight"
INDEXES = {
    "a tensor less": (lambda index: index["tensors"].pop(WEIGHT), r"missing: gpt_neox\.embed_in\.weight"),
    "a piece less": (lambda index: index["tensors"][WEIGHT]["pieces"].clear(), "lists 0 of 262144 values"),
    "another file": (lambda index: index.update(files=["../x.safetensors"]), "LATEST/x.safetensors: can't read"),
    "no dtype": (lambda index: index["tensors"][WEIGHT].update(dtype="save"), "shards.json: can't read it"),
    "a later format": (lambda index: index.update(format=2), "format 2; this version reads format 1"),
    "a list": (lambda index: index.update(tensors=[1]), "shards.json: can't read it"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_malformed_shard_index_is_named(kind, finished, run_dir):
    edit, message = INDEXES[kind]
    edit_index(run_dir / "LATEST", edit)
    with pytest.raises(UserError, match=message):
        load_checkpoint(finished[0], str(run_dir / "LATEST"))


def test_full_disk_in_the_thread_ends_the_run_and_leaves_the_previous_checkpoint(make_trainer, monkeypatch):
    trainer, n_written = make_trainer(*ALONE, "checkpoint_async=true", "save_every=4"), itertools.count()
    create_run_dir(trainer.config)

    def save_or_fail(tensors, path):
        if next(n_written) > 0:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("checkpointing.sharded.save_file", save_or_fail)
    with pytest.raises(UserError, match=r"can't write the checkpoint .*/step-8 .*No space left.*keep_checkpoints=N"):
        trainer.train()
    assert trainer.state.examples == 12  # the error is raised at the next save
    run_dir = Path(trainer.run_dir)
    assert os.readlink(run_dir / "LATEST") == "step-4" and find_corruption(str(run_dir / "LATEST")) is None
    assert not half_saved(run_dir)


@pytest.mark.exhaustive
def test_training_error_waits_for_the_checkpoint_being_written(make_trainer, monkeypatch):
    trainer, step = make_trainer(*ALONE, "checkpoint_async=true"), BasicTrainer.train_step
    create_run_dir(trainer.config)

    def save_slowly(tensors, path):
        time.sleep(0.3)
        save_file(tensors, path)

    def step_or_fail(batch):
        if trainer.state.examples == 8:
            raise RuntimeError("out of luck")
        return step(trainer, batch)

    monkeypatch.setattr("checkpointing.sharded.save_file", save_slowly)
    monkeypatch.setattr(trainer, "train_step", step_or_fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    assert find_corruption(f"{trainer.run_dir}/LATEST") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["checkpoint_async=true"],
            "checkpoint_async=true .*checkpoint_format=whole .*: add checkpoint_format=sharded",
        ),
        (["checkpoint_format=shards"], "checkpoint_format=shards: must be one of whole, sharded.*Did you mean sharded"),
    ],
    ids=str,
)
def test_impossible_checkpoint_format_is_refused(overrides, message, make_trainer):
    with pytest.raises(UserError, match=message):
        make_trainer(*RUN, *overrides)
