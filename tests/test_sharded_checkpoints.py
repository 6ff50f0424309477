"""Runs that write sharded checkpoints, also in a thread: what they hold, resuming, adapters, and faults."""

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
from conftest import trainers_in
from safetensors.torch import save_file
from test_resume import assert_same_run, half_saved
from test_shards import run_export

from checkpointing.integrity import find_corruption
from checkpointing.restoring import load_checkpoint, resume_training
from checkpointing.resume import find_checkpoints
from checkpointing.sharded import ShardedCheckpoint
from commands.run_directory import create_run_dir
from trainers import BasicTrainer
from utils import UserError

# ---- two workers ----------------------------------------------------------------------------------------------------

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


PLAIN = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")  # for from_pretrained


def test_sharded_checkpoints_hold_the_same_state_as_whole_ones(never_stopped, launcher, tmp_path):
    whole = tmp_path / "whole"
    assert launcher.run(*RUN, "trainer=FSDPTrainer", f"local_run_dir={whole}", n_workers=2) == 0, launcher.output
    assert sorted(os.listdir(never_stopped)) == sorted(os.listdir(whole))
    assert os.readlink(never_stopped / "BEST") == os.readlink(whole / "BEST")
    for name in PLAIN:  # which only a run's last checkpoint has
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
    "a missing tensor": (lambda index: index["tensors"].pop(WEIGHT), r"missing: gpt_neox\.embed_in\.weight"),
    "a missing piece": (lambda index: index["tensors"][WEIGHT]["pieces"].clear(), "lists 0 of 262144 values"),
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
