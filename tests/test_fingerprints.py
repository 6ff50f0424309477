"""A run resumes only with the same weights and data as at its start; their paths may change."""

import hashlib
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from conftest import ORACLE, REPOSITORY, mark_exhaustive_except, read_jsonl
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import basics.files
from basics.files import HashCache
from checkpointing.atomic_directory import atomic_directory
from checkpointing.fingerprints import changed_models, file_fingerprints, hub_revisions
from config_checks.schema import CONFIG_DIR
from data.batches import BatchIterator, Prompt

pytestmark = pytest.mark.slow

SHORT = [
    "loss=dpo", "max_length=128", "max_prompt_length=64", "n_examples=8", "n_eval_examples=4", "eval_batch_size=4",
    "sample_during_eval=false", "lr=1e-3", "model=blank_model", "model.reference_dtype=float32", "datasets=[hh]",
]  # fmt: skip


@pytest.fixture
def inputs(tmp_path, sft_archive):
    """Copy a model folder, an archive and data, which the test may change; return overrides that use the copies."""
    shutil.copytree(ORACLE / "model", tmp_path / "model")
    shutil.copytree(ORACLE / "hh", tmp_path / "hh")
    shutil.copy(sft_archive, tmp_path / "policy.pt")
    return [*SHORT, f"model.name_or_path={tmp_path}/model", f"dataset_paths.hh={tmp_path}/hh"]


def change_weights(path):
    """Add a little to every weight of a file."""
    if path.suffix == ".pt":
        archive = torch.load(path, weights_only=True)
        archive["state"] = {name: tensor + 0.01 for name, tensor in archive["state"].items()}
        torch.save(archive, path)
    else:
        save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def change_data(path):
    """Change the last character of the last row's text."""
    text = path.read_text()
    assert text.endswith('."}\n')
    path.write_text(text.removesuffix('."}\n') + '!"}\n')


def overrides_and_path(launcher, tmp_path, inputs, name):
    """Return overrides that use the input to be changed, and its path."""
    if name == "adapter":
        adapter_run = [*inputs, "loss=sft", "lora={r:4}", f"local_run_dir={tmp_path}/sft"]
        assert launcher.run(*adapter_run) == 0, launcher.output
        shutil.copytree(tmp_path / "sft/LATEST", tmp_path / "adapter", ignore=shutil.ignore_patterns("SHA256SUMS"))
        return [f"model.adapter={tmp_path}/adapter"], "adapter/adapter_model.safetensors"
    if name == "archive":
        return [f"model.archive={tmp_path}/policy.pt"], "policy.pt"
    return [], {"model": "model/model.safetensors", "train": "hh/train.jsonl", "test": "hh/test.jsonl"}[name]


@pytest.mark.parametrize(
    ("name", "named"),
    mark_exhaustive_except(
        [
            ("archive", "model.archive={}/policy.pt"),
            ("adapter", "model.adapter={}/adapter"),
            ("model", "model.name_or_path={}/model"),
            ("train", "datasets=[hh], train split"),
            ("test", "datasets=[hh], test split"),
        ],
        ("train", "datasets=[hh], train split"),
    ),
)
def test_overwritten_input_is_named_and_refused_on_resume(name, named, launcher, inputs, tmp_path):
    overrides, path = overrides_and_path(launcher, tmp_path, inputs, name)
    run = [*inputs, *overrides, f"local_run_dir={tmp_path}/run", "resume=auto"]
    assert launcher.run(*run) == 0, launcher.output
    (change_data if path.endswith("jsonl") else change_weights)(tmp_path / path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert launcher.run(*run, "n_examples=12") == 1, launcher.output
    changed = re.search(r"these inputs have changed since the run began:\n((?:  .*\n)+)", launcher.output)
    assert changed[1] == f"  {named.format(tmp_path)}\n"
    assert "Traceback" not in launcher.output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert launcher.run(*run, "n_examples=12", "resume_anyway=true") == 0, launcher.output
    assert f"WARNING: these inputs have changed since the run began:\n  {named.format(tmp_path)}\n" in launcher.output
    assert launcher.run(*run, "n_examples=16") == 0, launcher.output  # its last checkpoint has the new fingerprint


def test_moved_inputs_are_accepted_on_resume(launcher, inputs, tmp_path):
    run = [*inputs, f"model.archive={tmp_path}/policy.pt"]
    assert launcher.run(*run, f"local_run_dir={tmp_path}/run") == 0, launcher.output
    (tmp_path / "elsewhere").mkdir()
    for name in ("model", "hh", "policy.pt"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere/policy.pt").rename(tmp_path / "elsewhere/start.pt")
    moved = [
        *SHORT,
        f"model.name_or_path={tmp_path}/elsewhere/model",
        f"dataset_paths.hh={tmp_path}/elsewhere/hh",
        f"model.archive={tmp_path}/elsewhere/start.pt",
    ]
    assert launcher.run(*moved, "n_examples=12", f"resume={tmp_path}/run") == 0, launcher.output
    assert f"model.archive: {tmp_path}/policy.pt → {tmp_path}/elsewhere/start.pt" in launcher.output

    shutil.copytree(tmp_path / "elsewhere", tmp_path / "changed")
    for change, name, message in (
        (change_data, "hh/train.jsonl", "inputs have changed since the run began:\n  datasets=[hh], train split\n"),
        (change_weights, "start.pt", f"it would be another run:\n  model.archive: {tmp_path}/elsewhere/start.pt → "),
    ):
        change(tmp_path / "changed" / name)
        changed = [override.replace("/elsewhere/", "/changed/") for override in moved]
        assert launcher.run(*changed, "n_examples=16", f"resume={tmp_path}/run") == 1
        assert message in launcher.output


def test_inputs_are_remembered_before_the_first_checkpoint(launcher, inputs, tmp_path):
    run = [*inputs, f"local_run_dir={tmp_path}/run", "resume=auto"]
    launcher.start(*run, "n_examples=4000", "save_every=4000", "eval_every=4000")
    launcher.wait_for("First step: ")
    launcher.kill(signal.SIGKILL)
    launcher.wait()
    assert not (tmp_path / "run/LATEST").exists()
    change_data(tmp_path / "hh/train.jsonl")
    assert launcher.run(*run) == 1
    assert "inputs have changed since the run began:\n  datasets=[hh], train split\n" in launcher.output
    assert OmegaConf.load(tmp_path / "run/config.yaml").datasets == ["hh"]


def test_checkpoint_without_fingerprints_resumes(launcher, inputs, tmp_path):
    run = [*inputs, f"local_run_dir={tmp_path}/run", "resume=auto"]
    assert launcher.run(*run) == 0, launcher.output
    config = tmp_path / "run/config.yaml"
    config.write_text("".join(config.read_text().splitlines(keepends=True)[1:]))
    path = tmp_path / "run/LATEST/state.json"
    state = json.loads(path.read_text())
    assert state.pop("inputs").keys() == {
        "model.name_or_path",
        "datasets=[hh], train split",
        "datasets=[hh], test split",
    }
    path.write_text(json.dumps(state))
    (tmp_path / "run/LATEST/SHA256SUMS").write_text(f"{sha256(path)}  state.json\n")
    change_data(tmp_path / "hh/train.jsonl")
    assert launcher.run(*run, "n_examples=12") == 0, launcher.output
    assert "inputs" in json.loads(path.read_text())


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.exhaustive
def test_workers_report_a_changed_input_once(launcher, inputs, tmp_path):
    run = [*inputs, f"local_run_dir={tmp_path}/run", "resume=auto"]
    assert launcher.run(*run) == 0, launcher.output
    change_data(tmp_path / "hh/test.jsonl")
    assert launcher.run(*run, "trainer=FSDPTrainer", "n_examples=16", n_workers=2) == 1
    assert launcher.output.count("inputs have changed since the run began:\n  datasets=[hh], test split\n") == 1
    assert "Traceback" not in launcher.output


# ---- what a fingerprint notices -------------------------------------------------------------------------------------


def archive_fingerprint(path) -> str:
    keys = {"name_or_path": "nobody/nothing", "tokenizer_name_or_path": None, "archive": str(path), "adapter": None}
    config = {"model": {**keys, "from_scratch": False}, "local_dirs": [str(path.parent)]}
    return file_fingerprints(OmegaConf.create(config))["model.archive"]


@pytest.mark.parametrize("megabytes", mark_exhaustive_except([0.5, 63.5, 64, 100], 0.5, 100))
def test_fingerprint_changes_with_a_files_ends_middle_and_size(megabytes, tmp_path):
    size, path = int(megabytes * 2**20), tmp_path / "weights.pt"
    block = os.urandom(2**20)
    path.write_bytes((block * 101)[:size])
    before = archive_fingerprint(path)
    assert archive_fingerprint(path) == before
    for place in (0, size // 77, size // 63 * 30, size - 1):
        with open(path, "r+b") as file:
            file.seek(place)
            former = file.read(1)
            file.seek(place)
            file.write(bytes([former[0] ^ 1]))
        assert archive_fingerprint(path) != before
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(former)
    assert archive_fingerprint(path) == before
    os.truncate(path, size - 1)
    assert archive_fingerprint(path) != before


def test_fingerprint_of_an_earlier_version_is_still_recognized(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(os.urandom(2**20) * 80)
    keys = {"name_or_path": "nobody/nothing", "tokenizer_name_or_path": None, "archive": str(path), "adapter": None}
    config = OmegaConf.create({"model": {**keys, "from_scratch": False}, "local_dirs": [str(tmp_path)]})
    earlier, now = file_fingerprints(config, sampled=True), file_fingerprints(config)
    assert earlier != now
    assert changed_models(config, earlier, now) == changed_models(config, now, now) == []
    path.write_bytes(os.urandom(2**20) * 80)
    assert changed_models(config, earlier, file_fingerprints(config)) == ["model.archive"]


def test_changed_chat_template_is_noticed_unless_an_earlier_version_left_it_out(tmp_path):
    shutil.copytree(ORACLE / "model", tmp_path / "model")
    keys = {"name_or_path": f"{tmp_path}/model", "tokenizer_name_or_path": None, "archive": None, "adapter": None}
    config = OmegaConf.create({"model": {**keys, "from_scratch": False}, "local_dirs": [str(tmp_path)]})
    (tmp_path / "model/chat_template.jinja").write_text("{{ messages }}")
    former, earlier = file_fingerprints(config), file_fingerprints(config, templates=False)
    (tmp_path / "model/chat_template.jinja").write_text("{{ messages }}!")
    assert changed_models(config, former, file_fingerprints(config)) == ["model.name_or_path"]
    assert changed_models(config, earlier, file_fingerprints(config)) == []


def test_hash_is_cached_until_the_file_changes_even_with_the_same_mtime(tmp_path, monkeypatch):
    path, n_read = tmp_path / "data.jsonl", []
    path.write_text("a" * 10)
    hash_file = basics.files.sha256
    monkeypatch.setattr("basics.files.sha256", lambda path: n_read.append(1) or hash_file(path))
    monkeypatch.setattr("basics.files._SETTLED", 0)
    stat = os.stat(path)
    first = HashCache(str(tmp_path / "cache")).sha256(str(path))
    assert HashCache(str(tmp_path / "cache")).sha256(str(path)) == first == hash_file(path)
    assert len(n_read) == 1
    time.sleep(0.02)  # another tick of the file system's clock
    path.write_text("b" * 10)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as tar, rsync -t and images do
    assert HashCache(str(tmp_path / "cache")).sha256(str(path)) == hash_file(path) != first
    with open(tmp_path / "cache/file_hashes.jsonl", "a") as file:
        file.write('{"stat": [1, 2')  # cut off by a crash
    assert HashCache(str(tmp_path / "cache")).sha256(str(path)) == hash_file(path)


# ---- the other commands ---------------------------------------------------------------------------------------------

COMMANDS = [path.stem for path in CONFIG_DIR.glob("*.yaml") if re.search(r"^run:", path.read_text(), re.MULTILINE)]
WORDS = {  # by command: the words beside run=RUN
    "evaluate": [],
    "sample": ["max_new_tokens=4", "output={tmp}/samples.jsonl"],
    "export": ["output={tmp}/plain"],
}


@pytest.fixture(scope="module")
def lora_run(launcher, sft_archive):
    """Train a LoRA adapter on a copied model folder; return the directory with `model` and `run`."""
    directory = launcher.directory / "lora"
    shutil.copytree(ORACLE / "model", directory / "model")
    run = [*SHORT, f"model.name_or_path={directory}/model", f"dataset_paths.hh={ORACLE}/hh", "lora={r:2}"]
    assert launcher.run(*run, f"local_run_dir={directory}/run") == 0, launcher.output
    return directory


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_refuses_a_run_whose_base_has_changed(command, launcher, lora_run, tmp_path):
    words = [f"run={lora_run}/run", *(word.format(tmp=tmp_path) for word in WORDS[command])]
    options = {"script": REPOSITORY / f"{command}.py", "of_training": command != "export", "as_typed": True}
    weights = lora_run / "model/model.safetensors"
    before = weights.read_bytes()
    try:
        change_weights(weights)
        assert launcher.run(*words, **options) == 1, launcher.output
    finally:
        weights.write_bytes(before)
    assert "Traceback" not in launcher.output
    assert f"inputs have changed since its run began:\n  model.name_or_path={lora_run}/model\n" in launcher.output
    assert os.listdir(tmp_path) == []
    assert launcher.run(*words, **options) == 0, launcher.output


@pytest.mark.exhaustive
def test_run_that_replaced_another_of_the_same_name_is_not_mistaken_for_it(launcher, inputs, tmp_path):
    def use(command: str, *words: str) -> int:
        words = [f"run={tmp_path}/run", f"output={tmp_path}/{command}.jsonl", *words]
        return launcher.run(*words, script=REPOSITORY / f"{command}.py", as_typed=True)

    for lr in ("lr=1e-3", "lr=2e-3"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert launcher.run(*inputs, lr, "n_examples=4", f"local_run_dir={tmp_path}/run") == 0, launcher.output
        assert use("evaluate") == 0, launcher.output
        code = use("sample", "max_new_tokens=4")
        if lr == "lr=2e-3":
            assert code == 1 and "samples that were written under other settings" in launcher.output
        else:
            assert code == 0, launcher.output
    first, second = read_jsonl(tmp_path / "evaluate.jsonl")
    assert first["metrics"]["loss/eval"] != second["metrics"]["loss/eval"]


@pytest.mark.parametrize(
    "key",
    mark_exhaustive_except(
        ["model.adapter", "reference_model.adapter", "model.name_or_path", "model.archive"],
        "model.adapter",
        "model.name_or_path",
    ),
)
def test_damaged_weights_beside_checksums_are_refused_wherever_they_are_loaded(key, launcher, lora_run, tmp_path):
    if "adapter" in key:
        shutil.copytree(lora_run / "run/LATEST", tmp_path / "damaged")
        given = [f"model.name_or_path={lora_run}/model"]
    else:
        with atomic_directory(str(tmp_path / "damaged")) as partial:
            shutil.copytree(ORACLE / "model", partial, dirs_exist_ok=True)
        given = [] if key == "model.name_or_path" else [f"model.name_or_path={lora_run}/model"]
    (weights,) = (tmp_path / "damaged").glob("*model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 64
    weights.write_bytes(content)
    run = [
        *SHORT,
        *given,
        f"{key}={tmp_path}/damaged",
        f"dataset_paths.hh={ORACLE}/hh",
        f"local_run_dir={tmp_path}/run",
    ]
    assert launcher.run(*run) == 1, launcher.output
    assert f"{weights.name} doesn't match its checksum in SHA256SUMS: the file is damaged" in launcher.output
    assert "Traceback" not in launcher.output


def test_fingerprint_covers_all_texts_and_pairs_of_a_split():
    def fingerprints(**changed):
        entry = {"text": "a", "responses": ["b", "c"], "pairs": [(0, 1)], "sft_target": "b", **changed}
        prompts = [Prompt(**entry, dataset=name, split="train", truncation_mode="keep_end") for name in ("hh", "shp")]
        return BatchIterator(
            [[prompt] for prompt in prompts], None, 1, True, False, 0, 1, None, True, (0, 1)
        ).fingerprints()

    first = fingerprints()
    assert first.keys() == {"datasets=[hh], train split", "datasets=[shp], train split"}
    assert fingerprints() == first
    for changed in ({"text": "A"}, {"responses": ["b", "d"]}, {"pairs": [(1, 0)]}, {"sft_target": "c"}):
        assert fingerprints(**changed)["datasets=[hh], train split"] != first["datasets=[hh], train split"]


def test_hub_models_fingerprint_is_its_commit(launcher, tmp_path):
    cache = launcher.directory / "cache"  # the layout of the hub's cache
    user = next(iter(cache.glob("*")), None)
    if user is None:
        pytest.skip("no local dir yet")
    folder = user / "models--somebody--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(ORACLE / "model", folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a" * 40)
    config = OmegaConf.create({"local_dirs": [str(cache)], "model": {"name_or_path": "somebody/tiny"}})
    assert hub_revisions(config) == {"model.name_or_path": "a" * 40}
    run = ["model.name_or_path=somebody/tiny", f"dataset_paths.hh={ORACLE}/hh", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*SHORT, *run) == 0, launcher.output
    (folder / "refs/main").write_text("b" * 40)
    assert launcher.run(*SHORT, *run, "n_examples=12", "resume=auto") == 1
    assert "inputs have changed since the run began:\n  model.name_or_path=somebody/tiny\n" in launcher.output
