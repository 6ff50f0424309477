"""A run directory belongs to one process at a time, and files that the run didn't write are left untouched."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
from conftest import mark_exhaustive_except, read_jsonl
from launcher import Run, wait_until
from test_launch import children_of

from basics.locks import locked_directory
from checkpointing.atomic_directory import recover_interrupted_saves
from utils import UserError

RUN = [
    "model=tiny", "datasets=[toy]", "loss=dpo", "n_examples=4000", "batch_size=4", "n_eval_examples=4",
    "eval_batch_size=4", "max_length=64", "max_prompt_length=32", "sample_during_eval=false", "wandb.enabled=false",
    "save_every=40", "minimum_log_interval_secs=0", "resume=auto",
]  # fmt: skip


def locked_run(path: Path) -> contextlib.AbstractContextManager:
    """Hold a run directory for this process alone, as train.py does."""
    return locked_directory(str(path), f"local_run_dir={path}", "another process is running this run")


@pytest.fixture
def start(launcher, tmp_path):
    """Return a function that starts the command of one and the same run."""

    def start_command(*overrides: str, **kwargs) -> Run:
        return launcher.start(*RUN, f"local_run_dir={tmp_path}/run", *overrides, in_order=True, **kwargs)

    return start_command


@pytest.mark.slow
@pytest.mark.parametrize("when", mark_exhaustive_except(["at once", "while it trains"], "while it trains"))
def test_only_one_of_two_runs_trains_in_a_directory(when, start, tmp_path):
    runs = [start()]
    if when == "while it trains":
        runs[0].wait_for("First step: ")
    runs.append(start())
    wait_until(lambda: any("error: " in run.output for run in runs))
    trains, refused = sorted(runs, key=lambda run: "error: " in run.output)
    assert refused.wait() == 1, refused.output
    assert f"error: local_run_dir={tmp_path}/run: another process is running this run" in refused.output
    if when == "while it trains":  # started at once, the other may not have written its process id yet
        assert f"this run: process {trains.children[0]} on {socket.gethostname()}" in refused.output
    assert "Traceback" not in refused.output
    trains.wait_for("wrote")
    trains.kill(signal.SIGTERM)
    assert trains.wait() == 75
    steps = [
        line["counters/updates"] for line in read_jsonl(tmp_path / "run/metrics.jsonl") if line["split"] == "train"
    ]
    assert steps == list(range(1, len(steps) + 1))
    assert ".lock" not in os.listdir(tmp_path / "run")


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "training"])
def test_workers_and_lock_end_with_a_killed_parent(when, start, tmp_path):
    run = start("trainer=FSDPTrainer", "world_size=2", forks_workers=when == "training")
    process = psutil.Process(*run.children)
    wait_until(lambda: len(children_of(process.pid)) == 2)
    if when == "training":
        run.wait_for("First step: ")
    children = process.children()
    run.kill(signal.SIGKILL)
    run.wait()
    with locked_run(tmp_path / "run"):
        pass
    wait_until(lambda: not any(child.is_running() for child in children))
    assert (tmp_path / "run/config.yaml").exists() == (when == "training")


def test_locked_directory_is_removed_unless_written_to(tmp_path):
    with locked_run(tmp_path / "new/run"):
        assert os.listdir(tmp_path / "new/run") == [".lock"]
    assert os.listdir(tmp_path) == []
    (tmp_path / "there").mkdir()
    with locked_run(tmp_path / "there"), locked_run(tmp_path / "new/run"):
        (tmp_path / "new/run/config.yaml").write_text("")
    assert sorted(os.listdir(tmp_path)) == ["new", "there"]
    assert os.listdir(tmp_path / "new/run") == ["config.yaml"]


def test_forked_child_does_not_keep_the_lock(launcher, tmp_path):
    script = f"""
import os, signal, sys, time
from basics.locks import locked_directory
with locked_directory({str(tmp_path / "run")!r}, "local_run_dir", "it is held"):
    forked, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")
        time.sleep(600)
    os.read(forked, 1)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "script.py").write_text(script)
    run = launcher.start(script=tmp_path / "script.py", as_typed=True)
    assert run.wait() == -signal.SIGKILL, run.output
    child = int(run.output)
    assert psutil.Process(child).is_running()
    with locked_run(tmp_path / "run"):
        os.kill(child, signal.SIGKILL)


def test_competing_processes_never_hold_the_lock_together(launcher, tmp_path):
    script = f"""
import os, sys
from basics.locks import locked_directory
from utils import UserError
n = 0
while n < 150:
    try:
        with locked_directory({str(tmp_path / "run")!r}, "local_run_dir", "it is held"):
            os.close(os.open({str(tmp_path / "held")!r}, os.O_CREAT | os.O_EXCL))
            os.remove({str(tmp_path / "held")!r})
            n += 1
    except UserError as error:
        assert "it is held" in str(error), error
"""
    (tmp_path / "script.py").write_text(script)
    runs = [launcher.start(script=tmp_path / "script.py", as_typed=True) for _ in range(4)]
    assert [run.wait() for run in runs] == [0] * 4, runs[0].output
    assert set(tmp_path.rglob("*")) <= {tmp_path / "run", tmp_path / "script.py"}


def test_file_system_without_locks_warns(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked_run(tmp_path / "run"):
        assert "WARNING: local_run_dir=" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_file_in_place_of_the_run_directory_is_named(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=f"local_run_dir={tmp_path}/run: can't write there: .*Not a directory"):  # noqa: SIM117
        with locked_run(tmp_path / "run"):
            pass
    assert (tmp_path / "run").read_text() == "mine"


# ---- foreign files --------------------------------------------------------------------------------------------------

FOREIGN = ["data.partial-1", "notes.replaced", "step-4.partial-old", "LATEST.partial-DEADBEEF", "x-LATEST.replaced"]
OWN = ["step-4.partial-0123abcd", "LATEST.partial-deadbeef", "step-8.partial-deleted", "step-12.replaced"]


def fill(directory, names):
    for name in names:
        (directory / name).mkdir()
        (directory / name / "file").write_text(name)


def test_recovery_removes_only_files_that_a_run_made(tmp_path):
    fill(tmp_path, [*FOREIGN, *OWN])
    before = sorted(os.listdir(tmp_path))
    recover_interrupted_saves(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before  # without a config.yaml, it may be no run's directory
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "config.yaml.partial-new").write_text("")
    recover_interrupted_saves(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([*FOREIGN, "config.yaml", "step-12"])


@pytest.mark.slow
def test_directory_that_is_no_run_is_left_untouched(launcher, tmp_path):
    fill(tmp_path, [*FOREIGN, *OWN[:3], "empty"])  # a run is not started beside a step-12.replaced that isn't its own
    before = sorted(os.listdir(tmp_path))
    assert launcher.run(*RUN, f"resume={tmp_path}/empty") == 1
    assert "empty: neither a run directory, as there is no config.yaml in it, nor a checkpoint" in launcher.output
    assert sorted(os.listdir(tmp_path)) == before
    assert launcher.run(*RUN, "n_examples=4", f"local_run_dir={tmp_path}") == 0, launcher.output
    assert set(before) <= set(os.listdir(tmp_path))
