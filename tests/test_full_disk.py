"""A full disk, a limit or a moved directory: nothing is lost, and the message names the file and the remedy."""

import contextlib
import errno
import json
import logging
import os
import threading
from pathlib import Path

import pytest
from conftest import ORACLE
from launcher import train_after
from omegaconf import OmegaConf
from test_evaluate import RUN, trained  # noqa: F401 (a fixture)

from basics.errors import UserError
from basics.files import CannotWrite, append_json_lines, atomic_file, write_errors_named
from checkpointing.atomic_directory import atomic_directory
from checkpointing.checkpoints import point_to
from checkpointing.resume import resume_hinted
from commands import output
from commands.output import errors_reported
from commands.run_directory import create_run_dir
from data import arrow_cache, reading
from data.locations import Location
from evaluation.pairs import Pair, Task
from evaluation.sample_file import write_alpaca_eval
from evaluation.verdicts import Verdict, VerdictFile
from reporting.curves import save_figure
from reporting.trackers import TensorBoardTracker

resource = pytest.importorskip("resource")


@contextlib.contextmanager
def files_limited_to(n_bytes: int):
    """Let no file grow beyond `n_bytes`, as `ulimit -f` does: a longer write is cut off, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- the functions that write all files -----------------------------------------------------------------------------


def write_atomic(path: Path):
    with atomic_file(str(path)) as file:
        file.write("x" * 10_000)


def write_lines(path: Path):
    append_json_lines(str(path), [{"response": "x" * 100}] * 100)


def write_verdicts(path: Path):
    with contextlib.closing(VerdictFile(str(path), "s")) as file:
        for index in range(100):
            file.add(Task(Pair(index, 0, "p", "a", "b"), "a"), Verdict("first"))


def write_config(path: Path):
    create_run_dir(OmegaConf.create({"local_run_dir": str(path.parent), "long": "x" * 10_000}))


def write_alpaca(path: Path):
    samples = path.parent / "samples.jsonl"
    samples.write_text(json.dumps({"prompt_index": 0, "sample": 0, "prompt": "p", "response": "x" * 10_000}) + "\n")
    with files_limited_to(5000):
        write_alpaca_eval(str(path), str(samples), None)


def write_picture(path: Path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    save_figure(pyplot.figure(), str(path))


WRITERS = {  # function: the file that it writes
    write_atomic: "x.json", write_lines: "x.jsonl", write_verdicts: "v.jsonl", write_config: "config.yaml",
    write_alpaca: "alpaca.json", write_picture: "curves.png",
}  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_full_disk_names_the_file_and_the_remedy_and_leaves_whole_lines(write, tmp_path):
    path = tmp_path / WRITERS[write]
    limit = contextlib.nullcontext() if write is write_alpaca else files_limited_to(1500)
    with limit, pytest.raises(UserError) as raised:
        write(path)
    remedy = "make room, and give the same command again: what is written is kept"
    assert str(raised.value) == f"can't write to {path}: File too large; {remedy}"
    for line in path.read_text().splitlines() if path.exists() else []:
        json.loads(line)
    assert [name for name in os.listdir(tmp_path) if "partial" in name] == []


def test_lines_are_appended_all_or_none(tmp_path):
    path = tmp_path / "x.jsonl"
    append_json_lines(str(path), [{"kept": 1}])
    with files_limited_to(100), pytest.raises(CannotWrite):
        append_json_lines(str(path), [{"lost": 1}] * 20)
    assert path.read_text() == '{"kept": 1}\n'
    path.write_text('{"kept": 1}\n{"cut of')  # by a crash
    append_json_lines(str(path), [{"half a pair": "\ud83d"}])
    assert path.read_text() == '{"kept": 1}\n{"cut of\n{"half a pair": "\\ud83d"}\n'


# ---- commands and libraries -----------------------------------------------------------------------------------------


def test_figures_are_printed_even_if_a_full_disk_loses_their_file(trained, launcher, tmp_path):  # noqa: F811
    code = """
import errno, os
write = os.write
def full(descriptor, data):
    if os.path.exists("e.jsonl") and os.path.samestat(os.fstat(descriptor), os.stat("e.jsonl")):
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(descriptor, data)
os.write = full
"""
    script = train_after(code, tmp_path, "evaluate.py")
    words = [f"run={trained('dpo')}", "output=e.jsonl", "rows=r.jsonl"]
    assert launcher.run(*words, script=script, directory=tmp_path, as_typed=True) == 1
    assert "evaluation examples\n  loss/eval " in launcher.output and "Traceback" not in launcher.output
    assert "error: can't write to e.jsonl: No space left on device; make room" in launcher.output
    # so that the same command can be repeated: an existing r.jsonl would be refused
    assert (tmp_path / "e.jsonl").read_bytes() == b"" and not (tmp_path / "r.jsonl").exists()


def test_exhausted_memory_is_explained(capsys):
    with pytest.raises(SystemExit, match="error: the machine's memory, or a limit on it"), errors_reported():
        bytearray(2**62)


def test_full_disk_under_tensorboard_or_a_librarys_log_prints_no_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    output.quiet_libraries()
    tracker = TensorBoardTracker(str(tmp_path), 0)
    with files_limited_to(100), pytest.raises(OSError, match="File too large"):
        tracker.log(1, {f"metric {number}": 1.0 for number in range(1000)}, [])
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("tensorboard"):
            thread.join()
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and "WARNING: [Errno 27] File too large" in printed
    assert logging.raiseExceptions is False


def test_error_of_reading_another_file_is_not_reported_as_a_failed_write(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), atomic_file(str(tmp_path / "new")):
        (tmp_path / "missing").read_text()
    with pytest.raises(CannotWrite, match="nowhere/new"), atomic_file(str(tmp_path / "nowhere/new")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_error_of_a_parent_directory_is_reported_as_a_failed_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="file/above/run"), write_errors_named(f"{tmp_path}/file/above/run"):
        os.makedirs(f"{tmp_path}/file/above/run")


@pytest.mark.parametrize(
    ("number", "place", "expected"),
    [
        (errno.ENOSPC, None, "can't keep the rows of {data} in {cache}: "),
        (errno.EACCES, "{cache}/rows/x", "can't keep the rows of {data} in {cache}: "),
        (errno.EACCES, "{data}", "can't read {data}: "),
    ],
)
def test_error_distinguishes_the_data_from_its_cache(number, place, expected, tmp_path, monkeypatch):
    names = {"data": str(ORACLE / "hh/test.jsonl"), "cache": f"{tmp_path}/cache"}

    def prepare(_builder):
        raise OSError(number, os.strerror(number), place and place.format(**names))

    monkeypatch.setattr(arrow_cache, "prepare", prepare)
    with pytest.raises(UserError) as raised:
        reading.read_rows(Location("hh", names["data"], files={"train": [names["data"]]}), "train", names["cache"])
    assert str(raised.value).startswith(f"datasets=[hh], train split: {expected.format(**names)}")
    assert ("local_dirs" in str(raised.value)) == ("keep" in expected)


# ---- directories that change while a run writes there ---------------------------------------------------------------


def test_run_directory_that_is_moved_meanwhile_is_named(tmp_path):
    named = pytest.raises(UserError, match=f"local_run_dir={tmp_path}/run: it was moved or removed while the run")
    with named, resume_hinted(f"{tmp_path}/run", Exception):
        os.listdir(tmp_path / "run")


@pytest.mark.parametrize("kind", ["directory", "file"])
@pytest.mark.parametrize("name", ["LATEST", "BEST", "step-8"])
def test_foreign_file_that_appears_in_a_checkpoints_place_is_kept(name, kind, tmp_path):
    (tmp_path / name).mkdir() if kind == "directory" else (tmp_path / name).write_text("mine")
    if kind == "directory":
        (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no run wrote it; move it away"), atomic_directory(str(tmp_path / name)):
        pass
    with pytest.raises(UserError, match=r"can't link .*no run wrote it; move it away"):
        point_to(str(tmp_path), name, "step-4")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name / "thesis.txt" if kind == "directory" else tmp_path / name).read_text() == "mine"
