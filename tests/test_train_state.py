"""Resuming from older states, with changed keys, and after an interrupted reference pass."""

import hashlib
import json
import shutil
import signal

import pytest
from conftest import mark_exhaustive_except
from launcher import train_after, wait_until
from omegaconf import OmegaConf
from test_resume import FINISHED, TOY, log_lines

from checkpointing.same_run import _MAY_CHANGE
from checkpointing.stop_signal import EXIT_CODE
from config_checks.schema import default_config


@pytest.fixture(scope="module")
def finished(launcher):
    """Return the directories of a DPO run of 16 examples, and of the same run stopped after 8."""
    for name, overrides in (("whole", []), ("half", ["n_examples=8"])):
        code = launcher.run(*FINISHED, *overrides, f"local_run_dir={launcher.directory}/{name}")
        assert code == 0, launcher.output
    return launcher.directory / "whole", launcher.directory / "half"


def test_checkpoint_without_its_config_resumes(launcher, finished, tmp_path):
    whole, run_dir = finished[0], tmp_path / "run"
    shutil.copytree(finished[1], run_dir)
    config = OmegaConf.load(run_dir / "config.yaml")
    config.reference = "auto"
    config.model.name_or_path = "/old/place/models/tiny"
    OmegaConf.save(config, run_dir / "config.yaml")
    for checkpoint in ("step-4", "LATEST"):
        path = run_dir / checkpoint / "state.json"
        state = json.loads(path.read_text())
        del state["config"]
        path.write_text(json.dumps({**state, "config_sha256": "0" * 64}))
        sums = [line for line in (run_dir / checkpoint / "SHA256SUMS").read_text().splitlines() if "state" not in line]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (run_dir / checkpoint / "SHA256SUMS").write_text("\n".join([*sums, f"{digest}  state.json"]) + "\n")
    assert launcher.run(*FINISHED, "loss.beta=0.3", f"resume={run_dir}") == 1
    assert "loss.beta: 0.1 → 0.3" in launcher.output
    assert launcher.run(*FINISHED, f"resume={run_dir}") == 0, launcher.output
    trained, expected = ([line for line in log_lines(d) if line["split"] == "train"] for d in (run_dir, whole))
    assert trained == expected
    for name in ("model.safetensors", "optimizer.pt"):
        assert (run_dir / "LATEST" / name).read_bytes() == (whole / "LATEST" / name).read_bytes()


def test_all_keys_except_the_listed_ones_must_stay_the_same_on_resume():
    keys = set(default_config())
    assert {key for key in _MAY_CHANGE if not any(key == k or k.startswith(f"{key}.") for k in keys)} == set()
    deciding = keys - set(_MAY_CHANGE)
    for key in ("seed", "lr", "reference", "datasets", "model.policy_mp", "loss.beta", "optimizer_args", "max_length"):
        assert key in deciding


def test_resolved_reference_is_recorded(finished, make_trainer):
    assert OmegaConf.load(finished[0] / "config.yaml").reference == "model"
    assert json.loads((finished[0] / "LATEST/state.json").read_text())["config"]["reference"] == "model"
    assert make_trainer(*TOY, "loss=dpo", "lora={r:4}").config.reference == "adapter_off"
    assert make_trainer(*TOY, "loss=sft").config.reference == "auto"


@pytest.mark.parametrize("n_workers", mark_exhaustive_except([1, 2], 1))
def test_signal_during_precomputation_exits_with_75_and_keeps_the_cache(n_workers, launcher, tmp_path):
    overrides = [
        *TOY,
        "loss=dpo",
        "precompute_ref_log_probs=true",
        "n_eval_examples=4",
        f"local_run_dir={tmp_path}/run",
    ]
    overrides += ["sample_during_eval=false", "resume=auto"]
    overrides += ["trainer=FSDPTrainer"] if n_workers > 1 else []
    cache = launcher.directory / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    small_files = "from acceleration import reference_cache\nreference_cache._PAIRS_PER_FILE = 64"
    launcher.start(*overrides, "n_examples=2000", n_workers=n_workers, script=train_after(small_files, tmp_path))
    wait_until(lambda: list(cache.glob("*/reference_logps/*/*.safetensors")), output=lambda: launcher.output)
    launcher.kill(signal.SIGUSR1)
    assert launcher.wait() == EXIT_CODE, launcher.output
    assert "stopped by SIGUSR1" in launcher.output
    assert f"There is no checkpoint in {tmp_path}/run yet" in launcher.output
    assert not (tmp_path / "run").exists()

    assert launcher.run(*overrides, "n_examples=16", n_workers=n_workers) == 0, launcher.output
    assert "Reference log-probabilities: 4 computed" in launcher.output  # only the evaluation's are missing
