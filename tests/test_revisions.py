"""`model.revision` from a hub on loopback (see hub_server.py): loading, recording and resuming."""

import json
import re
import shutil

import pytest
import torch
from conftest import ORACLE, mark_exhaustive_except, read_jsonl
from hub_server import Hub
from huggingface_hub import ModelCard
from safetensors.torch import load, save
from test_hub import PYTHIA, SHORT, model_files
from tokenizers import Tokenizer

pytestmark = pytest.mark.slow

RUN = ["loss=dpo", "model=pythia28", "datasets=[toy]", *SHORT, "lr=1e-3", "warmup_steps=0"]
NAMES = ("logps_train/chosen", "rewards_train/margins", "loss/train", "grad_norm")


def version_files(scale: float, **tokenizer_entries: str) -> dict[str, bytes]:
    """Return the files of a model with scaled weights and these entries in tokenizer.json."""
    files = model_files()
    state = {name: tensor * scale for name, tensor in load(files["model.safetensors"]).items()}
    files["model.safetensors"] = save(state, {"format": "pt"})
    tokenizer = json.loads(files["tokenizer.json"])
    files["tokenizer.json"] = json.dumps(tokenizer | tokenizer_entries).encode()
    return files


@pytest.fixture
def hub(hub_address):
    """Start a hub with two versions of a model: the branch main, and the tag v1 with other weights and tokenizer."""
    with Hub(hub_address) as hub:
        repository = hub.repository("models", PYTHIA)
        repository.commit(version_files(1.1, normalizer={"type": "Lowercase"}), "v1")
        repository.commit(version_files(1.0))
        yield hub


@pytest.fixture
def run(train_from_hub, hub, tmp_path):
    """Return a function that runs `train.py` with the hub of the fixture `hub`."""

    def run_command(name: str, *overrides: str):
        return train_from_hub(*RUN, f"local_run_dir={tmp_path}/{name}", *overrides)

    return run_command


@pytest.fixture
def run_ok(run):
    def run_command(*words: str) -> str:
        result = run(*words)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    return run_command


def steps(run_dir) -> list[list[float]]:
    return [[line[name] for name in NAMES] for line in read_jsonl(run_dir / "metrics.jsonl") if "lr" in line]


def weights(run_dir) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "LATEST/policy.pt", weights_only=True)["state"]


def inputs(run_dir) -> dict[str, str]:
    return json.loads((run_dir / "LATEST/state.json").read_text())["inputs"]


def test_run_trains_its_revision_and_records_the_commit(run_ok, hub, tmp_path):
    (tmp_path / "folder").mkdir()
    repository = hub.repository("models", PYTHIA)
    for name, content in repository.commits[repository.refs["v1"]].items():
        (tmp_path / "folder" / name).write_bytes(content)
    run_ok("main")
    run_ok("tag", "model.revision=v1")
    run_ok("local", f"model.name_or_path={tmp_path}/folder")
    assert steps(tmp_path / "tag") == steps(tmp_path / "local") != steps(tmp_path / "main")
    for name, commit in (("main", "main"), ("tag", "v1")):
        assert inputs(tmp_path / name)["model.name_or_path"] == repository.refs[commit]
        card = ModelCard.load(tmp_path / name / "LATEST/README.md")
        assert card.data.base_model == PYTHIA and f"(revision `{repository.refs[commit]}`)" in card.text
        assert repository.refs[commit] in (tmp_path / name / "config.yaml").read_text().splitlines()[0]
    assert "\n  revision: v1\n" in (tmp_path / "tag/config.yaml").read_text()
    for name, is_lower_case in (("main", False), ("tag", True)):
        tokenizer = Tokenizer.from_file(str(tmp_path / name / "LATEST/tokenizer.json"))
        assert (tokenizer.encode("WHAT").ids == tokenizer.encode("what").ids) == is_lower_case


@pytest.mark.exhaustive
def test_run_of_a_tag_resumes_after_main_has_moved_but_not_after_the_tag_has(run, run_ok, hub, tmp_path):
    run_ok("whole", "model.revision=v1", "n_examples=8")
    run_ok("run", "model.revision=v1")
    repository = hub.repository("models", PYTHIA)
    repository.commit(version_files(0.5))
    run_ok("run", "model.revision=v1", "n_examples=8", "resume=auto")
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")
    ours, expected = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)

    repository.commit(version_files(0.5), "v1")
    result = run("run", "model.revision=v1", "n_examples=12", "resume=auto")
    assert result.returncode == 1
    assert f"inputs have changed since the run began:\n  model.name_or_path={PYTHIA}\n" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.exhaustive
def test_after_main_has_moved_a_run_resumes_with_the_commit_that_the_error_names(run, run_ok, hub, tmp_path):
    run_ok("whole", "n_examples=8")
    run_ok("run")
    first_commit = hub.repository("models", PYTHIA).refs["main"]
    hub.repository("models", PYTHIA).commit(version_files(0.5))
    result = run("run", "n_examples=8", "resume=auto")
    assert result.returncode == 1
    remedy = re.search(
        r"inputs have changed since the run began:\n  model\.name_or_path=\S+\n    (model\.revision=\S+) is",
        result.stderr,
    )
    assert remedy[1] == f"model.revision={first_commit}"
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    other = hub.repository("models", PYTHIA).refs["main"]
    result = run("run", f"model.revision={other}", "n_examples=8", "resume=auto")
    assert result.returncode == 1
    assert f"model.revision: None → {other}" in result.stderr
    run_ok("run", remedy[1], "n_examples=8", "resume=auto")
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")


@pytest.mark.parametrize(
    "key",
    mark_exhaustive_except(["reference_model.archive", "reference_model.name_or_path"], "reference_model.archive"),
)
def test_changed_reference_model_is_refused_on_resume(key, launcher, sft_archive, tmp_path):
    shutil.copytree(ORACLE / "model", tmp_path / "model")
    path = tmp_path / "model"
    if key.endswith("archive"):
        path = shutil.copy(sft_archive, tmp_path / "policy.pt")
    run = [*RUN, f"model.name_or_path={ORACLE}/model", f"{key}={path}", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run) == 0, launcher.output
    if key.endswith("archive"):
        state = torch.load(path, weights_only=True)["state"]
        torch.save({"step_idx": 0, "state": {n: w * 1.1 for n, w in state.items()}, "metrics": {}}, path)
    else:
        path = path / "model.safetensors"
        path.write_bytes(save({n: w * 1.1 for n, w in load(path.read_bytes()).items()}, {"format": "pt"}))
    assert launcher.run(*run, "n_examples=8", "resume=auto") == 1
    assert f"inputs have changed since the run began:\n  {key}={tmp_path}/" in launcher.output
