"""A run directory with damaged or foreign files is refused by a message that names the file."""

import hashlib
import itertools
import json
import os
import shutil

import pytest
import torch
from conftest import mark_exhaustive_except

from basics.locks import locked_directory
from checkpointing.resume import find_checkpoints
from utils import UserError

pytestmark = pytest.mark.slow

RUN = [
    "model=tiny", "datasets=[toy]", "loss=dpo", "n_examples=8", "n_eval_examples=4", "eval_batch_size=4", "lr=1e-3",
    "max_length=64", "max_prompt_length=32", "sample_during_eval=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(launcher):
    run_dir = launcher.directory / "finished"
    assert launcher.run(*RUN, f"local_run_dir={run_dir}") == 0, launcher.output
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def write_sums(checkpoint):
    """Update a checkpoint's SHA256SUMS to its changed files."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(checkpoint.iterdir())
        if path.name != "SHA256SUMS"
    ]
    (checkpoint / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def assert_resume_refused(refusal, run_dir):
    """Return a function that resumes the run, which must be refused with a message that has these parts."""

    def check(*parts: str):
        message = refusal(*RUN, "n_examples=12", f"local_run_dir={run_dir}", "resume=auto")
        assert all(part in message for part in parts), message

    return check


STATES = {
    "truncated": lambda state: json.dumps(state)[:300].encode(),
    "empty": lambda state: b"",
    "binary": lambda state: bytes(range(256)),
    "a list": lambda state: b"[1, 2]",
    "an empty object": lambda state: b"{}",
    "deeply nested": lambda state: b"[" * 100_000,
    "a string for a number": lambda state: json.dumps({**state, "examples": "eight"}).encode(),
    "a negative number": lambda state: json.dumps({**state, "batches": -1}).encode(),
    "an infinite number": lambda state: json.dumps({**state, "examples": float("inf")}).encode(),
    "a list for an object": lambda state: json.dumps({**state, "config": [1]}).encode(),
    "a string for a size": lambda state: json.dumps({**state, "log_bytes": {"metrics.jsonl": "x"}}).encode(),
    "a list for the metrics": lambda state: json.dumps({**state, "metrics": [1]}).encode(),
    "a number for a digest": lambda state: json.dumps({**state, "inputs": {"model.name_or_path": 5}}).encode(),
    "other keys": lambda state: json.dumps({"examples": 8, "config": state["config"]}).encode(),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    mark_exhaustive_except(STATES, "truncated", "a list", "a string for a number", "other keys"),
)
def test_malformed_state_json_is_named(kind, assert_resume_refused, run_dir):
    path = run_dir / "LATEST/state.json"
    path.write_bytes(STATES[kind](json.loads(path.read_text())))
    write_sums(run_dir / "LATEST")
    assert_resume_refused(f"{run_dir}/LATEST")


CONFIGS = {
    "truncated": lambda text: text[: text.index("loss:") + 8],
    "empty": lambda text: "",
    "binary": lambda text: bytes(range(256)).decode("latin-1"),
    "a list": lambda text: "- 1\n- 2\n",
    "a number": lambda text: "5\n",
    "no loss": lambda text: "seed: 0\n",
    "no model": lambda text: "seed: 0\nloss: {name: dpo}\n",
    "a number for an object": lambda text: text.replace("model:\n", "model: 5\nother:\n"),
    "no YAML": lambda text: "a: [b\n\t- }",
    "the first line, with fingerprints, cut": lambda text: text[:100] + "\n" + text,
    "a first line of another type": lambda text: text.splitlines()[0].split(": {")[0] + ": [1]\n" + text,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", mark_exhaustive_except(CONFIGS, "truncated", "a list", "no model", "the first line, with fingerprints, cut")
)
def test_malformed_config_yaml_is_named(kind, assert_resume_refused, run_dir):
    path = run_dir / "config.yaml"
    path.write_text(CONFIGS[kind](path.read_text()))
    shutil.rmtree(run_dir / "LATEST")  # its state.json has the config, too
    assert_resume_refused(f"{path}")


def test_edited_values_in_config_yaml_are_reported_as_changes(assert_resume_refused, run_dir):
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.001", "lr: [fast]").replace("seed: 0\n", ""))
    shutil.rmtree(run_dir / "LATEST")
    assert_resume_refused("lr: ['fast'] → 0.001")


@pytest.mark.parametrize(
    "content", ["garbage", "x" * 64 + "  state.json\n", "", "0" * 64 + "  ../config.yaml\n", "\0", "\xff\xfe"]
)
def test_malformed_checksums_are_named(content, assert_resume_refused, run_dir, capsys):
    (run_dir / "LATEST/SHA256SUMS").write_bytes(content.encode("latin-1"))
    assert_resume_refused("all of its checkpoints are damaged")
    assert ("SHA256SUMS" in capsys.readouterr().out) or content == "\xff\xfe"  # not UTF-8


CONTENTS = {
    "a list": [1, 2, 3],
    "a tensor": torch.zeros(3),
    "other keys": {"x": 1},
    "numbers": {"state": 5, "workers": 5},
    "an empty state": {"state": {}, "workers": [{}]},
    "strings for numbers": {
        "state": {"state": "x", "param_groups": "y", "last_epoch": "z", "_step_count": "z"},
        "workers": ["x"],
    },
    "values of other types": {
        "state": {"a": 1},
        "workers": [{"torch": torch.zeros(3), "cuda": [], "numpy": [1], "python": 2}],
    },
}


@pytest.mark.parametrize(
    ("name", "kind"),
    mark_exhaustive_except(
        itertools.product(["rng.pt", "scheduler.pt", "optimizer.pt", "policy.pt"], CONTENTS),
        lambda case: (
            case in (("rng.pt", "other keys"), ("policy.pt", "other keys"), ("optimizer.pt", "strings for numbers"))
        ),
    ),
)
def test_checkpoint_file_with_other_content_is_named(name, kind, assert_resume_refused, run_dir):
    torch.save(CONTENTS[kind], run_dir / "LATEST" / name)
    write_sums(run_dir / "LATEST")
    config = (run_dir / "config.yaml").read_bytes()
    assert_resume_refused(f"{run_dir}/LATEST")
    assert (run_dir / "config.yaml").read_bytes() == config


@pytest.mark.parametrize("name", ["SHA256SUMS", "state.json", "policy.pt", "model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "endless device"])
def test_checkpoint_file_that_is_a_pipe_or_a_device_is_named(name, kind, run_dir):
    path = run_dir / "LATEST" / name
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"{run_dir}/LATEST can't be used: .*it is not a regular file.*{name}"):
        find_checkpoints(str(run_dir), "LATEST")


@pytest.mark.exhaustive
def test_optimizer_state_with_other_shapes_is_named(launcher, assert_resume_refused, run_dir):
    path = run_dir / "LATEST/optimizer.pt"
    saved = torch.load(path, weights_only=True)
    saved["state"]["state"][0]["square_avg"] = torch.zeros(5, 7)
    torch.save(saved, path)
    write_sums(run_dir / "LATEST")
    assert_resume_refused("square_avg of parameter 0 has the shape (5, 7), not (2048, 128)")
    code = launcher.run(*RUN, "n_examples=12", f"local_run_dir={run_dir}", "resume=auto", "resume_anyway=true")
    assert code == 0, launcher.output


@pytest.mark.parametrize("value", ["true", "5", "[a]", "1.5"])
def test_resume_must_be_a_path_or_auto(value, refusal, tmp_path):
    message = refusal(*RUN, f"local_run_dir={tmp_path}/run", f"resume={value}")
    assert message.startswith("resume=") and "must be auto, a run directory or a checkpoint in one" in message


@pytest.mark.parametrize("resume", [[], ["resume=auto"]], ids=str)
def test_run_directory_that_is_a_file_is_named(resume, refusal, tmp_path):
    (tmp_path / "run").write_text("mine")
    for run_dir in (tmp_path / "run", tmp_path / "run/below"):
        assert f"local_run_dir={run_dir}: can't write there: " in refusal(*RUN, *resume, f"local_run_dir={run_dir}")
    assert (tmp_path / "run").read_text() == "mine"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("mode", [0o300, 0o500, 0o000])
def test_run_directory_without_permission_is_named(mode, tmp_path, monkeypatch):
    if os.getuid() != 0:
        pytest.skip("needs to become another user")
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    os.chown("run", 65534, -1)
    os.chmod("run", mode)
    os.seteuid(65534)  # root may do anything
    try:
        for run_dir in ("run", "run/below"):
            if (mode, run_dir) != (0o300, "run/below"):
                with pytest.raises(UserError, match=rf"local_run_dir={run_dir}: can't write there: \[Errno 13\]"):  # noqa: SIM117
                    with locked_directory(run_dir, f"local_run_dir={run_dir}", "it is held"):
                        pass
    finally:
        os.seteuid(0)
    assert os.listdir("run") == []
