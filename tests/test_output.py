"""Runs survive output that can't be displayed or isn't read; a cache that can't be written is an error."""

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, TIMEOUT, mark_exhaustive_except, read_jsonl
from launcher import Run, train_after, wait_until
from test_checkpoints import mounted  # noqa: F401 (a fixture)
from test_cli import CHECKPOINT_FILES, SHORT, TOY

pytestmark = pytest.mark.slow

LOCAL_ENV = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def assert_complete(run_dir: Path, n_examples: int = 8):
    assert sorted(os.listdir(run_dir / "LATEST")) == CHECKPOINT_FILES
    trained = [line["counters/examples"] for line in read_jsonl(run_dir / "metrics.jsonl") if line["split"] == "train"]
    assert trained == list(range(4, n_examples + 1, 4))


def shell(command: str, directory: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a bash command with `python train.py` in $TRAIN; its exit code is that of the pipe's first part."""
    environment = {**os.environ, **LOCAL_ENV, "TRAIN": f"{sys.executable} {REPOSITORY}/train.py", **env}
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=directory, env=environment, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=TIMEOUT,
    )  # fmt: skip


def words(*overrides: str) -> str:
    given = [*SHORT, "sample_during_eval=false", "wandb.enabled=false", "local_dirs=[cache]", "local_run_dir=run"]
    return " ".join([*given, *overrides])


ASCII = "import sys\nfor stream in (sys.stdout, sys.stderr):\n    stream.reconfigure(encoding='ascii', errors='strict')"


@pytest.fixture(params=mark_exhaustive_except(["streams", "locale"], "streams"))
def ascii_only(request) -> str:
    """Return what is limited to ASCII: the streams (as by PYTHONIOENCODING), or the locale of the whole process."""
    return request.param


@pytest.fixture
def train_ascii(ascii_only, train, train_in_new_python, tmp_path):
    if ascii_only == "streams":
        return functools.partial(train, script=train_after(ASCII, tmp_path))
    return functools.partial(train_in_new_python, env={"PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONUTF8": "0"})


def test_ascii_only_terminal_trains_and_escapes_other_letters(ascii_only, train_ascii, tmp_path):
    overrides = ["exp_name='β → é'", "loss=dpo", f"local_run_dir={tmp_path}/run"]
    result = train_ascii(*SHORT, *overrides)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.isascii()
    if ascii_only == "streams":  # the locale also changes how the command line is decoded
        assert "exp_name: \\u03b2 \\u2192 \\xe9" in result.stdout
    assert_complete(tmp_path / "run")
    result = train_ascii(*SHORT, "batch_size=6", "gradient_accumulation_steps=2", "trainer=FSDPTrainer", "world_size=2")
    assert result.returncode == 1
    assert "gradient_accumulation_steps=2 \\xd7 2 workers" in result.stderr


@pytest.fixture
def start_piped(launcher, tmp_path):
    """Return a function that starts a run, reads n lines of its output from a pipe and closes it, as `| head` does."""

    def start(n_lines: int, *overrides: str) -> list[str]:
        os.mkfifo(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        launcher.start(
            *SHORT,
            "sample_during_eval=false",
            f"local_run_dir={tmp_path}/run",
            *overrides,
            printed_to=str(tmp_path / "pipe"),
            forks_workers=True,
        )
        os.set_blocking(reader, True)
        with open(reader) as lines:
            return list(itertools.islice(lines, n_lines))

    return start


@pytest.mark.exhaustive
def test_head_closing_the_pipe_does_not_stop_training(tmp_path):
    result = shell(f"$TRAIN {words()} | head -n 5", tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == 5
    assert_only_warned(result.stderr.decode())
    assert_complete(tmp_path / "run")


def assert_only_warned(errors: str):
    for text in ("Traceback", "Exception", "BrokenPipe"):
        assert text not in errors
    assert "WARNING: nothing more is printed" in errors


BROKEN = "import os\nread, write = os.pipe()\nos.dup2(write, 1), os.close(write), os.close(read)"


@pytest.mark.exhaustive
def test_closed_stdout_pipe_does_not_stop_training(launcher, tmp_path):
    run = [*SHORT, "sample_during_eval=false", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run, script=train_after(BROKEN, tmp_path)) == 0, launcher.output
    assert_only_warned(launcher.output)
    assert_complete(tmp_path / "run")


CLOSED = "import os, sys\nsys.stdout = sys.stderr = None\nos.close(1), os.close(2)"  # as a shell's `>&- 2>&-`


def test_closed_streams_do_not_stop_training(launcher, tmp_path):
    run = [*SHORT, "sample_during_eval=false", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run, script=train_after(CLOSED, tmp_path)) == 0
    assert launcher.output == ""
    assert_complete(tmp_path / "run")


@pytest.mark.exhaustive
@pytest.mark.parametrize("streams", [">/dev/full", ">&- 2>&-"])
def test_full_or_closed_streams_of_a_shell_do_not_stop_training(streams, tmp_path):
    result = shell(f"$TRAIN {words()} {streams}", tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert b"Traceback" not in result.stderr
    assert_complete(tmp_path / "run")


def test_full_disk_under_both_streams_does_not_stop_training(launcher, tmp_path):
    run = [*SHORT, "sample_during_eval=false", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run, printed_to="/dev/full") == 0
    assert_complete(tmp_path / "run")


@pytest.mark.exhaustive
def test_workers_train_on_after_their_pipe_is_closed(start_piped, launcher, tmp_path):
    start_piped(5, "trainer=FSDPTrainer", "world_size=2", "minimum_log_interval_secs=1e-9")
    assert launcher.wait() == 0
    assert_complete(tmp_path / "run")


def test_signal_saves_a_checkpoint_even_with_a_closed_pipe(start_piped, launcher, tmp_path):
    start_piped(0, "n_examples=4000", "lr=1e-4")
    metrics = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    launcher.kill(signal.SIGTERM)
    assert launcher.wait() == 75
    assert_complete(tmp_path / "run", read_jsonl(metrics)[-1]["counters/examples"])


# ---- the reference's cache ------------------------------------------------------------------------------------------

PRECOMPUTED = [*TOY, "n_examples=8", "loss=dpo", "precompute_ref_log_probs=true", "sample_during_eval=false"]


@pytest.fixture
def precompute(launcher, tmp_path):
    def run(local: Path) -> Run:
        overrides = [f"local_run_dir={tmp_path}/run", f"local_dirs=[{local}]"]
        run = launcher.start(*PRECOMPUTED, *overrides, directory=tmp_path)
        run.wait()
        return run

    return run


def assert_refused(run: Run, *parts: str):
    assert run.code == 1, run.output
    assert "Traceback" not in run.output
    message = run.output[run.output.index("error: ") :]
    for part in parts:
        assert part in message


def test_file_in_place_of_a_cache_directory_is_named(precompute, tmp_path):
    local = tmp_path / "local"
    assert precompute(local).code == 0
    (fingerprint,) = local.glob("*/reference_logps/*")
    for path in (local, fingerprint):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        path.rename(tmp_path / "aside")
        path.write_text("")
        run = precompute(local)
        assert_refused(run, str(path), "local_dirs")
        # local_dirs is checked before the models are loaded, the cache in it only after
        assert ("building policy" in run.output) == (path == fingerprint)
        assert not (tmp_path / "run").exists()
        path.unlink()
        (tmp_path / "aside").rename(path)


def test_cache_on_a_full_or_read_only_disk_is_an_error(mounted, precompute):  # noqa: F811
    disk = mounted(4096 * 4)
    (disk / "full").write_bytes(b"0" * 4096 * 4)
    assert_refused(precompute(disk), f"log-probabilities in {disk}/", "No space left", "local_dirs=[DIR]")
    assert list(disk.rglob("*.safetensors*")) == []
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    run = precompute(disk)
    assert_refused(run, "precompute_ref_log_probs=true", "local_dirs", "Read-only file system")
    assert "building policy" not in run.output
