"""Checkpoints: their files, old and new archives, and faults while they are written or read."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ORACLE, REPOSITORY, mark_exhaustive_except, trainers_in
from omegaconf import OmegaConf
from test_cli import CHECKPOINT_FILES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import export
from checkpointing.archives import load_archive
from checkpointing.atomic_directory import atomic_directory, recover_interrupted_saves
from checkpointing.checkpoints import point_to
from checkpointing.integrity import find_corruption
from checkpointing.restoring import resume_training
from commands.run_directory import create_run_dir
from utils import UserError, disable_dropout

TOY = [
    "model=tiny", "datasets=[toy]", "n_examples=8", "n_eval_examples=8", "eval_batch_size=8", "lr=1e-3",
    "sample_during_eval=false", "max_length=64", "max_prompt_length=32", "eval_every=4",
]  # fmt: skip
IDS = torch.arange(1, 9)[None]


def trained(make_trainer, *overrides: str):
    """Train and save; return the trainer and its run directory."""
    trainer = make_trainer(*TOY, *overrides)
    create_run_dir(trainer.config)
    trainer.train()
    trainer.save()
    return trainer, Path(trainer.run_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Finish a run, for tests that only read it; return its trainer and its directory."""
    return trained(trainers_in(tmp_path_factory.mktemp("finished")))


@pytest.fixture
def run_dir(finished, tmp_path):
    """Copy the finished run's directory, which the test may change; return the copy."""
    return shutil.copytree(finished[1], tmp_path / "run", symlinks=True)


# ---- a checkpoint opens everywhere ----------------------------------------------------------------------------------


def test_every_checkpoint_opens_with_from_pretrained_and_generates(finished):
    trainer, run_dir = finished
    for name in ("step-4", "LATEST"):
        assert sorted(os.listdir(run_dir / name)) == CHECKPOINT_FILES
        model = AutoModelForCausalLM.from_pretrained(run_dir / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(run_dir / name)
        state = torch.load(run_dir / name / "policy.pt", weights_only=True)["state"]
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        prompt = tokenizer("\n\nHuman: Please write a short review.\n\nAssistant:", return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5)
        assert len(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])) > 0
    assert torch.equal(model(IDS).logits, trainer.policy.eval()(IDS).logits)


@pytest.fixture
def gpt2_dir(tmp_path):
    """Return the folder of a small GPT-2 with tied embeddings and dropout, and the tiny tokenizer."""
    shutil.copytree(ORACLE.parent.parent / "assets" / "tiny", tmp_path / "gpt2")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=128, vocab_size=2048, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    config.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_tied_weights_are_written_once_and_the_config_keeps_dropout_and_dtype(make_trainer, gpt2_dir):
    overrides = [f"model.name_or_path={gpt2_dir}", "model.policy_dtype=bfloat16"]
    trainer, run_dir = trained(make_trainer, *overrides)
    assert trainer.policy.config.resid_pdrop == 0
    config = AutoConfig.from_pretrained(run_dir / "LATEST")
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.1, 0.1, 0.1)
    model, info = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.eval()(IDS).logits, trainer.policy.eval()(IDS).logits)
    n_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert (run_dir / "LATEST/model.safetensors").stat().st_size == pytest.approx(n_bytes, rel=0.1)


@pytest.mark.parametrize("model", mark_exhaustive_except(["tiny", "gpt2"], "gpt2"))
def test_archive_loads_from_a_checkpoint_a_file_or_a_sharded_folder(model, make_trainer, gpt2_dir, tmp_path):
    overrides = [] if model == "tiny" else [f"model.name_or_path={gpt2_dir}"]
    trainer = make_trainer(*TOY, *overrides)
    create_run_dir(trainer.config)
    trainer.save()
    run_dir, expected = trainer.run_dir, trainer.policy.eval()(IDS).logits
    trainer.policy.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert not (tmp_path / "sharded/model.safetensors").exists()
    for archive in ("LATEST", "LATEST/policy.pt", "LATEST/model.safetensors", "../../../sharded"):
        other = make_trainer(*TOY, *overrides, f"model.archive={run_dir}/{archive}", "seed=1").policy
        assert torch.equal(other.eval()(IDS).logits, expected), archive


def test_adapter_given_as_archive_is_refused_with_a_hint_at_model_adapter(make_trainer):
    _, run_dir = trained(make_trainer, "lora={r:4}")
    with pytest.raises(UserError, match=r"give it as model\.adapter="):
        make_trainer(*TOY, f"model.archive={run_dir}/LATEST")
    assert "adapter_model.safetensors" in os.listdir(run_dir / "LATEST")
    assert "policy.pt" not in os.listdir(run_dir / "LATEST")


def test_unreachable_hub_id_is_named(make_trainer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"(?s)model\.archive=nobody/nothing: .*start once where the hub can be reached"
    ):
        make_trainer(*TOY, "model.archive=nobody/nothing")


def test_tokenizer_with_several_chat_templates_is_saved_checked_and_exported(make_trainer, tmp_path):
    shutil.copytree(REPOSITORY / "assets/tiny", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    _, run_dir = trained(make_trainer, f"model.name_or_path={tmp_path}/model")
    assert find_corruption(run_dir / "LATEST") is None
    export.run(OmegaConf.create({"run": str(run_dir), "checkpoint": "LATEST", "output": f"{tmp_path}/exported"}))
    for folder in (run_dir / "LATEST", tmp_path / "exported"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    (run_dir / "LATEST/additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    assert "additional_chat_templates/tool_use.jinja doesn't match" in find_corruption(run_dir / "LATEST")


# ---- when checkpoints are written and deleted -----------------------------------------------------------------------


def test_save_every_and_keep_checkpoints_keep_the_last_two_checkpoints(make_trainer):
    overrides = ["n_examples=24", "eval_every=24", "save_every=4", "keep_checkpoints=2", "save_optimizer=false"]
    trainer, run_dir = trained(make_trainer, *overrides)
    assert sorted(os.listdir(run_dir)) == [
        "LATEST", "config.yaml", "metrics.jsonl", "samples.jsonl", "step-16", "step-20",
    ]  # fmt: skip
    assert "optimizer.pt" not in os.listdir(run_dir / "step-20")
    assert find_corruption(run_dir / "step-20") is None
    with pytest.raises(UserError, match="save_optimizer=false; resume_anyway=true starts with a new one"):
        resume_training(trainer, str(run_dir / "LATEST"))


def test_latest_is_the_newest_whole_checkpoint_at_any_time(make_trainer, monkeypatch):
    trainer = make_trainer(*TOY, "n_examples=12")
    create_run_dir(trainer.config)
    latest, seen = Path(trainer.run_dir) / "LATEST", []
    step = trainer.train_step

    def look_and_step(batch):
        if latest.exists():
            assert find_corruption(latest) is None
            seen.append(os.readlink(latest))
        return step(batch)

    monkeypatch.setattr(trainer, "train_step", look_and_step)
    trainer.train()
    trainer.save()
    assert seen == ["step-4", "step-8"]
    assert not latest.is_symlink()
    assert json.loads((latest / "state.json").read_text())["examples"] == 12


# ---- written whole or not at all ------------------------------------------------------------------------------------


def write(path, text: str):
    with atomic_directory(str(path)) as partial, open(os.path.join(partial, "file"), "w") as file:
        file.write(text)


def test_directory_is_replaced_completely_or_not_at_all(tmp_path):
    write(tmp_path / "LATEST", "old")
    write(tmp_path / "LATEST", "new")
    with pytest.raises(UserError, match=r"can't write the checkpoint .*No space left.*keep_checkpoints=N"):  # noqa: SIM117
        with atomic_directory(str(tmp_path / "LATEST")):
            raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), atomic_directory(str(tmp_path / "LATEST")):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["LATEST"]
    assert (tmp_path / "LATEST/file").read_text() == "new"
    point_to(str(tmp_path), "LATEST", "step-4")
    assert os.readlink(tmp_path / "LATEST") == "step-4"
    write(tmp_path / "LATEST", "newer")
    assert (tmp_path / "LATEST/file").read_text() == "newer"
    assert os.listdir(tmp_path) == ["LATEST"]


@pytest.mark.parametrize("n_renames", [0, 1, 2, 3])
def test_crash_between_the_renames_leaves_a_whole_latest(n_renames, tmp_path, monkeypatch):
    write(tmp_path / "LATEST", "old")
    rename, done = os.rename, []

    def rename_or_die(*paths):
        if len(done) == n_renames:
            raise SystemExit
        rename(*paths)
        done.append(paths)

    monkeypatch.setattr(os, "rename", rename_or_die)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process removes nothing
    if n_renames < 3:
        with pytest.raises(SystemExit):
            write(tmp_path / "LATEST", "new")
    else:
        write(tmp_path / "LATEST", "new")
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 2
    recover_interrupted_saves(str(tmp_path))
    assert os.listdir(tmp_path) == ["LATEST"]
    assert (tmp_path / "LATEST/file").read_text() == ("new" if n_renames >= 2 else "old")


@pytest.mark.parametrize("exists", [False, True])
def test_users_own_directory_named_like_a_replaced_one_is_kept(exists, tmp_path):
    (tmp_path / "model.replaced").mkdir()
    (tmp_path / "model.replaced/mine").write_text("mine")
    if exists:
        (tmp_path / "model").mkdir()
        with pytest.raises(UserError, match=r"File exists: .*model\.replaced"):
            write(tmp_path / "model", "new")
    else:
        write(tmp_path / "model", "new")
    assert sorted(os.listdir(tmp_path)) == ["model", "model.replaced"]
    assert (tmp_path / "model.replaced/mine").read_text() == "mine"


def run_into(launcher, run_dir, *overrides):
    return launcher.run(*TOY, *overrides, f"local_run_dir={run_dir}")


@pytest.mark.exhaustive
def test_file_size_limit_leaves_the_previous_checkpoint_intact(launcher, tmp_path):
    assert run_into(launcher, tmp_path / "run", "eval_every=8", "save_every=8") == 0, launcher.output
    resource = pytest.importorskip("resource")
    limits = resource.prlimit(launcher.server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(launcher.server.pid, resource.RLIMIT_FSIZE, (4_490_000, limits[1]))
    try:
        overrides = [*TOY, "eval_every=8", "save_every=8", "n_examples=16", f"resume={tmp_path}/run"]
        code = launcher.run(*overrides)
    finally:
        resource.prlimit(launcher.server.pid, resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert f"error: can't write the checkpoint {tmp_path}/run/step-8 (OSError: " in launcher.output
    assert "File too large" in launcher.output
    assert "Traceback" not in launcher.output
    assert f"The last checkpoint is {tmp_path}/run/LATEST; to resume from it: " in launcher.output.splitlines()[-1]
    assert not any(".partial-" in name for name in os.listdir(tmp_path / "run"))
    assert find_corruption(tmp_path / "run/LATEST") is None
    assert launcher.run(*overrides) == 0, launcher.output


@pytest.fixture
def mounted(tmp_path):
    """Return a function that mounts a file system of `size` bytes in memory; skip the test if that isn't allowed."""

    def mount(size: int):
        (tmp_path / "small").mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(tmp_path / "small")]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a file system")
        return tmp_path / "small"

    yield mount
    subprocess.run(["umount", "-l", str(tmp_path / "small")], capture_output=True)


@pytest.mark.parametrize(
    "megabytes", mark_exhaustive_except([16, 20, 26], 20), ids=["policy.pt", "optimizer.pt", "model.safetensors"]
)
def test_full_disk_leaves_the_previous_checkpoint_intact(megabytes, launcher, mounted):
    disk = mounted(megabytes * 1_000_000)  # one checkpoint has 13.6 MB
    assert run_into(launcher, disk / "run") == 1
    assert f"error: can't write the checkpoint {disk}/run/LATEST (" in launcher.output
    assert "No space left on device" in launcher.output
    assert "Traceback" not in launcher.output
    assert f"The last checkpoint is {disk}/run/step-4; to resume from it: " in launcher.output.splitlines()[-1]
    assert sorted(os.listdir(disk / "run")) == ["LATEST", "config.yaml", "metrics.jsonl", "samples.jsonl", "step-4"]
    assert os.readlink(disk / "run/LATEST") == "step-4"
    subprocess.run(["mount", "-o", "remount,size=40000000", str(disk)], check=True)
    assert launcher.run(*TOY, f"resume={disk}/run") == 0, launcher.output
    assert find_corruption(disk / "run/LATEST") is None


def test_unwritable_run_directory_is_named(launcher, mounted, tmp_path):
    (tmp_path / "file").write_text("")
    assert run_into(launcher, tmp_path / "file/run") == 1
    assert f"local_run_dir={tmp_path}/file/run: can't write there: " in launcher.output
    disk = mounted(50_000_000)
    assert run_into(launcher, disk / "run") == 0, launcher.output
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert run_into(launcher, disk / "new") == 1
    assert f"local_run_dir={disk}/new: can't write there: [Errno 30] Read-only file system" in launcher.output
    assert launcher.run(*TOY, "n_examples=12", f"resume={disk}/run") == 1
    assert f"local_run_dir={disk}/run: can't write there: [Errno 30] Read-only file system" in launcher.output
    assert "Traceback" not in launcher.output


# ---- damaged and malicious files ------------------------------------------------------------------------------------


class Intruder:
    """Creates a file if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["policy.pt", "optimizer.pt", "scheduler.pt", "rng.pt"])
def test_pickle_with_code_is_refused_and_not_run(name, make_trainer, run_dir, tmp_path):
    trainer = make_trainer(*TOY)
    bad = {"step_idx": 4, "state": {"x": Intruder(tmp_path / "trace")}, "metrics": {}}
    torch.save(bad, run_dir / "step-4" / name)
    (run_dir / "step-4/SHA256SUMS").unlink()
    with pytest.raises(UserError, match=f"{name}: can't read it .*[Uu]npickl"):
        resume_training(trainer, str(run_dir / "step-4"))
    if name == "policy.pt":
        with pytest.raises(UserError, match=f"{name}: can't read it .*[Uu]npickl"):
            load_archive(str(run_dir / "step-4"), trainer.policy)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("damaged", ["truncated", "bit flipped", "empty"])
@pytest.mark.parametrize("name", ["policy.pt", "model.safetensors"])
def test_damaged_archive_is_refused(name, damaged, finished, run_dir):
    policy = finished[0].policy
    path = run_dir / "LATEST" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[:-1000], "bit flipped": content, "empty": b""}[damaged])
    with pytest.raises(UserError, match=f"{name} doesn't match its checksum in SHA256SUMS: the file is damaged"):
        load_archive(str(path), policy)
    if damaged != "bit flipped":
        (run_dir / "LATEST/SHA256SUMS").unlink()
        with pytest.raises(UserError, match=f"{name}: can't read it as a checkpoint"):
            load_archive(str(path), policy)


def test_checkpoint_of_another_model_lists_the_tensors_that_do_not_fit(make_trainer, gpt2_dir):
    trainer = make_trainer(*TOY)
    _, run_dir = trained(make_trainer, f"model.name_or_path={gpt2_dir}")
    with pytest.raises(UserError, match=r"policy.pt doesn't fit the model.*\n  left over: .*\n(.*\n)*  and \d+ more"):
        resume_training(trainer, str(run_dir / "LATEST"))
    with pytest.raises(UserError, match=r"LATEST/policy\.pt doesn't fit the model"):
        load_archive(str(run_dir / "LATEST"), trainer.policy)


# ---- archives of the original ---------------------------------------------------------------------------------------

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LAYER_BUFFERS = {  # of transformers 4.29, by layer
    "gpt2": ["transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"],
    "gptj": ["transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"],
    "llama": ["model.layers.{}.self_attn.rotary_emb.inv_freq"],
    "gpt_neox": ["gpt_neox.layers.{}.attention." + name for name in ("bias", "masked_bias", "rotary_emb.inv_freq")],
}
CONFIGS = {  # small versions of the original's models; those of one class differ only in size
    "gpt2-large": transformers.GPT2Config(**GPT2),
    "gpt2-xl": transformers.GPT2Config(**{**GPT2, "n_layer": 3}),
    "gptj": transformers.GPTJConfig(**GPT2, rotary_dim=4),
    "llama7b": transformers.LlamaConfig(**SIZES, intermediate_size=64),
    "pythia28": transformers.GPTNeoXConfig(**SIZES, intermediate_size=64),
    "pythia69": transformers.GPTNeoXConfig(**{**SIZES, "num_hidden_layers": 3}, intermediate_size=64),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_archive_of_2023_loads_for_each_of_the_original_models(name, tmp_path):
    config = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config).eval()
    state = dict(model.state_dict())
    if config.model_type == "gpt_neox":
        state["embed_out.weight"] = state.pop("embed_out.weight", state.pop("lm_head.weight", None))
    for layer in range(config.num_hidden_layers):
        for buffer in LAYER_BUFFERS[config.model_type]:
            state[buffer.format(layer)] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    torch.save({"step_idx": 8, "state": state, "metrics": {"loss/eval": 1.0}}, tmp_path / "policy.pt")

    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(config).eval()
    assert not torch.equal(other(IDS).logits, model(IDS).logits)
    load_archive(str(tmp_path / "policy.pt"), other)
    assert torch.equal(other(IDS).logits, model(IDS).logits)

    left_over = "transformer.h.0.attn.rotary.weight"
    lacking = next(key for key in state if key.endswith("norm.weight") or key.endswith("ln_1.weight"))
    bad = {**state, left_over: state[lacking]}
    del bad[lacking]
    torch.save({"step_idx": 8, "state": bad, "metrics": {}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=rf"left over: {left_over}\n  missing: {lacking}"):
        load_archive(str(tmp_path / "bad.pt"), other)


def test_archive_of_the_original_gives_its_recorded_logits():
    archive = ORACLE / "archives" / "gpt_neox"
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(archive)).eval()
    disable_dropout(model)
    load_archive(str(archive / "policy.pt"), model)
    recorded = json.loads((archive / "logits.json").read_text())
    with torch.no_grad():
        logits = model(torch.tensor(recorded["input_ids"])).logits[:, -1]
    torch.testing.assert_close(logits, torch.tensor(recorded["last_position_logits"]), rtol=0, atol=1e-5)
