"""The program runs on systems without Unix's modules, signals and symbolic links."""

import ast
import functools
import json
import os
import socket
import sys

import pytest
import torch
from conftest import REPOSITORY
from portable import MODULES
from test_layout import FOLDERS

from basics import locks
from basics.links import followed, link_target, make_link
from checkpointing.checkpoints import delete_oldest, point_to
from checkpointing.resume import find_checkpoints
from config_checks.checks import check_config
from train import compose_config
from utils import UserError, widest_dtype

PORTABLE = REPOSITORY / "tests/portable.py"
SOURCES = [*REPOSITORY.glob("*.py"), *(path for folder in FOLDERS for path in folder.glob("**/*.py"))]


@pytest.mark.exhaustive
def test_all_commands_run_without_what_windows_lacks(launcher, tmp_path):
    """One process runs all commands, one after the other."""
    run = [
        "model=tiny", "datasets=[toy]", "loss=dpo", "eval_every=8", "batch_size=8", "n_eval_examples=4",
        "eval_batch_size=4", "max_length=48", "max_prompt_length=24", "sample_during_eval=false", "keep_best=loss/eval",
        "wandb.enabled=false", f"local_run_dir={tmp_path}/run", f"local_dirs=[{tmp_path}/cache]", "resume=auto",
    ]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The film was"}\n')
    (tmp_path / "says_a.py").write_text("import sys\nfor line in sys.stdin:\n    print('A', flush=True)\n")
    judge = f"judge_command='{sys.executable} {tmp_path}/says_a.py'"
    sample = ["sample.py", f"run={tmp_path}/run", "prompts=prompts.jsonl", "max_new_tokens=4"]
    commands = [
        ["train.py", *run, "n_examples=16"],
        ["train.py", *run, "n_examples=24"],
        ["evaluate.py", f"run={tmp_path}/run", "checkpoint=BEST"],
        [*sample, "output=a.jsonl"],
        [*sample, "output=b.jsonl", "seed=1"],
        ["judge.py", "a=a.jsonl", "b=b.jsonl", "output=v.jsonl", "judge=command", judge],
        ["export.py", f"run={tmp_path}/run", "output=exported", "checkpoint=BEST"],
    ]
    assert launcher.run(json.dumps(commands), script=PORTABLE, as_typed=True, directory=tmp_path) == 0, launcher.output
    assert "Resuming from" in launcher.output
    best = (tmp_path / "run/BEST").read_bytes()
    assert best in (b"step-8\n", b"step-16\n", b"step-24\n")
    assert f"step-{best[5:-1].decode()}" in launcher.output.partition("Resuming from")[2]
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".lock")]
    assert json.loads((tmp_path / "v.jsonl").read_text())["verdict"] in ("a", "b", "tie")
    assert (tmp_path / "exported/model.safetensors").exists()


def test_run_is_locked_on_systems_without_flock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    run = functools.partial(locks.locked_directory, str(tmp_path / "run"), "local_run_dir", "it is held")
    with run():
        with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"), run():
            pass
        assert sorted(os.listdir(tmp_path / "run")) == [".lock", ".lock.lock"]
    assert os.listdir(tmp_path) == []
    with run():
        pass


# ---- links that are files -------------------------------------------------------------------------------------------


@pytest.fixture(params=["symbolic links", "files"])
def linking(request, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(1314, "A required privilege is not held by the client")

    if request.param == "files":
        monkeypatch.setattr(os, "symlink", refuse)
    return request.param


def test_link_is_followed_anywhere_in_a_path(linking, tmp_path):
    (tmp_path / "step-8").mkdir()
    (tmp_path / "step-8/policy.pt").write_text("weights")
    make_link("step-8", str(tmp_path / "BEST"))
    assert link_target(str(tmp_path / "BEST")) == "step-8"
    assert (tmp_path / "BEST").is_file() == (linking == "files")
    with open(followed(str(tmp_path / "BEST/policy.pt"))) as file:
        assert file.read() == "weights"
    config = compose_config("model=tiny", "loss=dpo", f"model.archive={tmp_path}/BEST/policy.pt")
    check_config(config)
    assert os.path.samefile(config.model.archive, tmp_path / "step-8/policy.pt")


@pytest.mark.parametrize("path", ["gpt2", "owner/LATEST", "LATEST", "a/BEST/b", "", "/", "~/x"])
def test_path_without_a_link_stays_as_it_is(path):
    assert followed(path) == path


def test_other_files_named_like_a_link_are_not_links(tmp_path):
    for content in (b"", b"step-", b"step-8\nmore", b"\xff", b"../step-8"):
        (tmp_path / "LATEST").write_bytes(content)
        assert link_target(str(tmp_path / "LATEST")) is None


def test_link_moves_and_keeps_its_checkpoint(linking, tmp_path):
    for step in (8, 16, 24):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}/state.json").write_text("{}")
        (tmp_path / f"step-{step}/SHA256SUMS").write_text(f"{'0' * 64}  state.json\n")
    for name in ("step-16", "step-8"):
        point_to(str(tmp_path), "BEST", name)
        assert link_target(str(tmp_path / "BEST")) == name
    delete_oldest(str(tmp_path), 1, 24)
    assert sorted(os.listdir(tmp_path)) == ["BEST", "step-24", "step-8"]


def test_checkpoint_all_leaves_out_links(linking, make_trainer):
    trainer = make_trainer("model=tiny", "datasets=[toy]", "loss=sft", "n_examples=4", "n_eval_examples=4")
    trainer.save(f"{trainer.run_dir}/step-4")
    for link in ("LATEST", "BEST"):
        point_to(trainer.run_dir, link, "step-4")
    (path,) = find_checkpoints(trainer.run_dir, "all")
    assert os.path.basename(path) == "step-4"
    (path,) = find_checkpoints(trainer.run_dir, "BEST")
    assert os.path.samefile(f"{trainer.run_dir}/step-4", path)


# ---- other systems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["FSDPTrainer", "TensorParallelTrainer"])
def test_several_workers_are_refused_on_windows(trainer, monkeypatch):
    config = compose_config("model=tiny", "loss=dpo", f"trainer={trainer}")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match=f"trainer={trainer} .*Windows: choose trainer=BasicTrainer, or .*WSL"):
        check_config(config)


def test_float64_is_refused_on_apples_gpus(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (widest_dtype(torch.device("mps")), widest_dtype(torch.device("cpu"))) == (torch.float32, torch.float64)
    with pytest.raises(UserError, match=r"model.policy_dtype=float64: Apple's GPUs have no float64; use float32"):
        check_config(compose_config("model=tiny", "loss=dpo", "model.policy_dtype=float64"))


def opened_as_text(tree: ast.AST):
    """Yield the calls that open a file as text."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        owner = getattr(getattr(call.func, "value", None), "id", None)
        if name in ("read_text", "write_text"):
            yield call
        if name in ("open", "fdopen") and owner in (None, "io", "os") and (name, owner) != ("open", "os"):
            modes = [*call.args[1:2], *(word.value for word in call.keywords if word.arg == "mode")]
            if not any("b" in mode.value for mode in modes):
                yield call
        if any(word.arg in ("text", "universal_newlines") for word in call.keywords) and owner == "subprocess":
            yield call


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_text_is_read_and_written_in_utf_8(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    without = [call.lineno for call in opened_as_text(tree) if "encoding" not in {word.arg for word in call.keywords}]
    assert not without
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & MODULES
