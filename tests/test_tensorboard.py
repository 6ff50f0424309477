"""TensorBoard's event files, read back with its own reader."""

import os
from pathlib import Path

import pytest
from conftest import read_jsonl
from launcher import train_after
from test_cli import SHORT

RUN = [*SHORT, "loss=dpo", "minimum_log_interval_secs=1e-9", "tensorboard.enabled=true"]

pytestmark = pytest.mark.slow


def scalars(run_dir: Path) -> dict[tuple[str, int], float]:
    """Return the logged values by name and step; if a resumed run logged a step twice, the last value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    assert any(tag.startswith("samples/policy") for tag in events.Tags()["tensors"])
    return {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}


def expected(run_dir: Path) -> dict[tuple[str, int], float]:
    return {
        (name, line["counters/examples"]): pytest.approx(value, rel=1e-6)
        for line in read_jsonl(run_dir / "metrics.jsonl")
        for name, value in line.items()
        if name != "split"
    }


def test_event_files_hold_everything_in_metrics_jsonl_even_after_a_resume(launcher, tmp_path):
    run = [*RUN, "eval_every=4", "n_examples=12", "warmup_steps=0", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run) == 0, launcher.output
    assert "WARNING: TensorBoard" not in launcher.output
    assert scalars(tmp_path / "run") == expected(tmp_path / "run")
    for name in ("LATEST", "step-8"):
        os.rename(tmp_path / "run" / name, tmp_path / name)
    assert launcher.run(*run, "resume=auto") == 0, launcher.output
    assert "Resuming from" in launcher.output
    assert scalars(tmp_path / "run") == expected(tmp_path / "run")


def test_missing_tensorboard_matters_only_when_enabled(launcher, tmp_path):
    script = train_after("import sys; sys.modules['tensorboard'] = None", tmp_path)
    run = [*SHORT, "sample_during_eval=false"]
    assert launcher.run(*run, f"local_run_dir={tmp_path}/run", script=script) == 0, launcher.output
    assert launcher.run(*run, "tensorboard.enabled=true", f"local_run_dir={tmp_path}/run2", script=script) == 1
    assert "pip install tensorboard" in launcher.output
    assert not (tmp_path / "run2").exists()


def test_unwritable_tensorboard_warns_once_and_training_continues(launcher, tmp_path):
    """TensorBoard's directory can't be made, because a file has its name."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("")
    run = [*RUN, "warmup_steps=0", "sample_during_eval=false", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run) == 0, launcher.output
    assert launcher.output.count("WARNING: TensorBoard") == 1
    assert len(read_jsonl(tmp_path / "run/metrics.jsonl")) == 4
