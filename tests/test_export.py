"""`export.py`: a plain folder for `from_pretrained` of any checkpoint, or a message and nothing written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, trainers_in
from launcher import train_after
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from checkpointing.integrity import find_corruption
from commands.run_directory import create_run_dir
from utils import UserError

RUN = [
    "datasets=[toy]", "loss=sft", "n_examples=8", "n_eval_examples=4", "lr=1e-2", "max_length=64",
    "max_prompt_length=32", "sample_during_eval=false", "save_every=4", "eval_every=8", "warmup_steps=0",
]  # fmt: skip
IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(request, tmp_path_factory):
    """Finish a run whose base is a copy of the tiny model; return its trainer and the directory of `run` and `base`."""
    directory = tmp_path_factory.mktemp("run")
    base = shutil.copytree(REPOSITORY / "assets/tiny", directory / "base")
    trainer = trainers_in(directory)("model=tiny", *RUN, "debug=true")
    trainer.policy.save_pretrained(base)
    kind = ["lora={r:2}"] if request.param == "lora" else []
    trainer = trainers_in(directory)(
        f"model.name_or_path={base}", *RUN, *kind, f"local_run_dir={directory}/run", "exp_name=x"
    )
    from checkpointing import fingerprints

    trainer.state.inputs = fingerprints.file_fingerprints(trainer.config)
    create_run_dir(trainer.config, trainer.state.inputs)
    trainer.train()
    trainer.save()
    return trainer, directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """Copy `run` and `base`, which the test may change; return their directory."""
    shutil.copytree(finished[1] / "run", tmp_path / "run", symlinks=True)
    shutil.copytree(finished[1] / "base", tmp_path / "base")
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace(f"{finished[1]}/base", f"{tmp_path}/base"))
    return tmp_path


def run_export(run_dir: Path, output: Path, checkpoint: str = "LATEST"):
    export.run(OmegaConf.create({"run": str(run_dir), "checkpoint": checkpoint, "output": str(output)}))


def test_exported_folder_holds_the_policy_without_files_of_training(finished, copied, capsys):
    run_export(copied / "run", copied / "plain")
    is_merged = hasattr(finished[0].policy, "peft_config")
    checkpoint, done = copied / "run/LATEST", capsys.readouterr().out.splitlines()[-1]
    assert done == (
        f"Merged the adapter of {checkpoint} into its base; wrote the model to {copied}/plain"
        if is_merged
        else f"Wrote the model of {checkpoint} to {copied}/plain"
    )
    model = AutoModelForCausalLM.from_pretrained(copied / "plain").eval()
    torch.testing.assert_close(model(IDS).logits, finished[0].policy.eval()(IDS).logits, rtol=1e-5, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(copied / "plain")) == 2048
    names = set(os.listdir(copied / "plain"))
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"policy.pt", "optimizer.pt", "scheduler.pt", "rng.pt", "state.json", "adapter_config.json"}
    card = (copied / "plain/README.md").read_text()
    assert "library_name: transformers" in card and "AutoPeftModel" not in card


def test_earlier_checkpoint_is_exported_by_its_name(copied):
    (copied / "plain").mkdir()  # an empty directory is accepted
    run_export(copied / "run", copied / "plain", "step-4")
    assert "4 examples, 1 optimizer step." in (copied / "plain/README.md").read_text()


@pytest.mark.parametrize("output", ["run", "run/LATEST", "base", "file"])
def test_output_that_holds_anything_is_refused(output, copied):
    (copied / "file").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    with pytest.raises(UserError, match=rf"output={copied}/{output}: .*(not empty|not a directory)"):
        run_export(copied / "run", copied / output)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def damage_checkpoint(directory: Path):
    (path,) = [*directory.glob("run/LATEST/policy.pt"), *directory.glob("run/LATEST/adapter_model.safetensors")]
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def change_base(directory: Path):
    model = AutoModelForCausalLM.from_pretrained(directory / "base")
    model.get_output_embeddings().weight.data[0] += 1
    model.save_pretrained(directory / "base")


@pytest.mark.parametrize(
    ("edit", "checkpoint", "message"),
    [
        (damage_checkpoint, "LATEST", "run/LATEST can't be used: .* the file is damaged"),
        (lambda d: (d / "run/config.yaml").write_text("a: ["), "LATEST", r"config\.yaml: can't read"),
        (lambda d: (d / "run/config.yaml").write_text("1"), "LATEST", r"config\.yaml: can't read"),
        (lambda d: (d / "run/config.yaml").unlink(), "LATEST", "no run there, as it has no config.yaml"),
        (lambda _: None, "step-5", "checkpoint=step-5: .* has no such checkpoint; it has LATEST, step-4"),
    ],
)
def test_unusable_checkpoint_is_refused_and_nothing_is_written(edit, checkpoint, message, copied):
    edit(copied)
    with pytest.raises(UserError, match=message):
        run_export(copied / "run", copied / "plain", checkpoint)
    assert sorted(os.listdir(copied)) == ["base", "run"]


def test_checkpoint_given_for_its_run_is_refused_with_the_keys_to_set(copied):
    message = rf"run={copied}/run/LATEST: no run there.* its name: run={copied}/run checkpoint=LATEST$"
    with pytest.raises(UserError, match=message):
        run_export(copied / "run" / "LATEST", copied / "plain")


def test_mistyped_run_inside_a_run_directory_is_not_taken_for_a_checkpoint(copied, monkeypatch):
    monkeypatch.chdir(copied / "run")
    with pytest.raises(UserError, match=r"^run=typo: no run there, as it has no config\.yaml\.$"):
        run_export(Path("typo"), copied / "plain")


def test_adapter_is_not_merged_into_a_base_that_has_changed(finished, copied):
    change_base(copied)
    is_adapter = hasattr(finished[0].policy, "peft_config")
    if not is_adapter:  # the checkpoint holds all weights, so the base may change
        run_export(copied / "run", copied / "plain")
        return
    with pytest.raises(
        UserError, match=rf"inputs have changed since its run began:\n  model\.name_or_path={copied}/base"
    ):
        run_export(copied / "run", copied / "plain")
    assert sorted(os.listdir(copied)) == ["base", "run"]


def test_full_disk_while_exporting_leaves_nothing(copied, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UserError, match=r"No space left on device.*; make room, or choose another output"):
        run_export(copied / "run", copied / "plain")
    assert sorted(os.listdir(copied)) == ["base", "run"]


UMASK = "import os; os.umask(0o027)"


@pytest.mark.slow
def test_command_exports_with_the_umasks_permissions_and_refuses_mistakes(copied, launcher, tmp_path):
    def command(*words: str) -> int:
        script = train_after(UMASK, tmp_path, "export.py")
        return launcher.run(f"run={copied}/run", *words, script=script, as_typed=True, directory=copied)

    assert command("output=plain") == 0, launcher.output
    assert "|" not in launcher.output  # no progress bars
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (copied / "plain").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {"0o640"}
    assert find_corruption(copied / "plain") == "SHA256SUMS doesn't list state.json"
    assert json.loads((copied / "plain/config.json").read_text())["vocab_size"] == 2048
    for words, message in (
        ([], "output is required"), (["output=plain"], "not empty"), (["ouput=x"], "Did you mean output?"),
    ):  # fmt: skip
        assert command(*words) == 1
        assert launcher.output.startswith("error: ") and message in launcher.output
        assert "Traceback" not in launcher.output
