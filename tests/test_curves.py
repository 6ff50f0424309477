"""Pictures of runs show the run's numbers, and training doesn't wait for them."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, read_jsonl
from launcher import train_after
from test_cli import SHORT

from reporting import curves, drawing
from reporting.drawing import CurvesDrawer
from reporting.runs import NoRuns, find_runs, read_run


def write_run(directory: Path, n: int = 40, loss=None, **config) -> Path:
    """Write a run directory as training leaves it, with made-up numbers."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("# inputs\n" + yaml.safe_dump({"max_grad_norm": 10.0, **config}))
    lines = []
    for i in range(n + 1):
        for split in ("train",) * (i > 0) + ("eval",) * (i % 10 == 0):
            line = {"split": split, "counters/examples": 4 * i, "counters/updates": i, f"loss/{split}": 1 / (i + 1)}
            line |= {f"rewards_{split}/accuracies": 0.5 + i / 100, f"rewards_{split}/margins": i / 10}
            line |= {f"logps_{split}/chosen": -10.0 - i, f"logps_{split}/rejected": -20.0 - i}
            line |= {"grad_norm": 3.0 + i, "lr": 1e-5} if split == "train" else {"loss/eval_se": 0.1}
            lines.append(line)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"split": "tr')
    return directory


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def drawn_lines(runs, monkeypatch, tmp_path) -> dict[str, list]:
    """Return the lines of each panel, by its title, as matplotlib has them when the picture is saved."""
    from matplotlib.figure import Figure

    panels = {}

    def read(figure, *args, **kwargs):
        for axis in figure.axes:
            data = [(line.get_xdata(), line.get_ydata()) for line in axis.get_lines()]
            panels[axis.get_title(loc="left")] = [(list(x), [float(v) for v in y]) for x, y in data]
        return savefig(figure, *args, **kwargs)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", read)
    curves.draw(runs, str(tmp_path / "picture.png"))
    return panels


def test_picture_shows_the_runs_numbers(monkeypatch, tmp_path):
    run = read_run(str(write_run(tmp_path / "run")))
    panels = drawn_lines([run], monkeypatch, tmp_path)
    assert len(panels) == 6
    for title, name in (("loss", "loss"), ("margin of the rewards", "rewards_{}/margins")):
        for split in ("train", "eval"):
            key = name.format(split) if "{}" in name else f"{name}/{split}"
            x = [line["counters/examples"] for line in getattr(run, split)]
            assert (x, [line[key] for line in getattr(run, split)]) in panels[title], (title, split)
    ((x, y),) = [line for line in panels["learning rate"]]
    assert (x[0], x[-1], set(y)) == (4, 160, {1e-5})
    # raw, smoothed and evaluations, for chosen and rejected responses
    assert len(panels["log-probability of responses (nats)"]) == 2 * 3
    assert [0.0, 1.0] in [list(x) for x, y in panels["gradient norm, before clipping"]]  # the line at max_grad_norm
    assert png_size(tmp_path / "picture.png")[0] == 1200
    assert sorted(os.listdir(tmp_path)) == ["picture.png", "run"]


def test_smoothing_is_a_mean_over_the_last_values():
    assert curves.smoothed([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    assert curves.smoothed([1.0, 2.0], 1) == [1.0, 2.0]


def test_runs_are_labelled_by_the_settings_that_differ(tmp_path):
    for beta in (0.1, 0.5):
        write_run(tmp_path / f"sweep/b{beta}", loss={"name": "dpo"}, exp_name=str(beta))
        path = tmp_path / f"sweep/b{beta}/config.yaml"
        path.write_text(yaml.safe_dump({"loss": {"name": "dpo", "beta": beta}, "exp_name": str(beta), "lr": 1e-5}))
    labels = ["loss.beta=0.1", "loss.beta=0.5"]
    for given in ([f"{tmp_path}/sweep"], [f"{tmp_path}/sw*/b*"], [f"{tmp_path}/sweep/b0.1", f"{tmp_path}/sweep/b0.5/"]):
        assert [run.label for run in find_runs(given)] == labels
    assert len(find_runs([f"{tmp_path}/sweep", f"{tmp_path}/sweep/b0.1"])) == 2
    assert [run.label for run in find_runs([f"{tmp_path}/sweep/b0.1"])] == ["b0.1"]
    (tmp_path / "empty").mkdir()
    assert len(find_runs([f"{tmp_path}/empty", f"{tmp_path}/sweep/b0.1"])) == 1
    with pytest.raises(NoRuns, match="no run there; give a run directory"):
        find_runs([f"{tmp_path}/nowhere", f"{tmp_path}/sweep/b0.1"])
    for nothing in ("nowhere", "empty", "no*"):
        with pytest.raises(NoRuns, match="no run there; give a run directory"):
            find_runs([str(tmp_path / nothing)])


@pytest.mark.slow
def test_curves_command_draws_one_run_or_several(run_python, tmp_path):
    for name, lr in (("a", 1e-5), ("b", 2e-5)):
        write_run(tmp_path / name, lr=lr)
    env = {"PYTHONPATH": str(REPOSITORY)}
    result = run_python("-m", "reporting.curves", "a", env=env)
    assert (result.returncode, result.stdout) == (0, "a/curves.png\n"), result.stderr
    result = run_python("-m", "reporting.curves", "a", "b", env=env)
    assert (result.returncode, result.stdout) == (0, "curves.png\n"), result.stderr
    assert png_size(tmp_path / "a/curves.png")[0] == png_size(tmp_path / "curves.png")[0] == 1200
    result = run_python("-m", "reporting.curves", "nowhere", env=env)
    assert result.returncode == 1 and result.stderr.startswith("error: nowhere: no run there")


@pytest.mark.slow
def test_training_draws_curves_png(launcher, tmp_path):
    run = [*SHORT, "loss=dpo", "sample_during_eval=false", "curves=true"]
    assert launcher.run(*run, f"local_run_dir={tmp_path}/run") == 0, launcher.output
    assert png_size(tmp_path / "run/curves.png")[0] == 1200
    assert not [name for name in os.listdir(tmp_path / "run") if "partial" in name]
    assert (
        "WARNING: largest learning rate" in launcher.output
        and "the run has only 2 steps, and warmup_steps=150" in " ".join(launcher.output.split())
    )
    assert launcher.output.count("WARNING") == 1


@pytest.mark.slow
def test_missing_matplotlib_warns_once(launcher, tmp_path):
    script = train_after(
        "import importlib.util as u\nf = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'matplotlib' else f(name, *rest)",
        tmp_path,
    )
    run = [*SHORT, "sample_during_eval=false", "eval_every=4", "curves=true", f"local_run_dir={tmp_path}/run"]
    assert launcher.run(*run, script=script) == 0, launcher.output
    assert launcher.output.count("No curves.png, as matplotlib is not installed") == 1
    assert "LATEST" in os.listdir(tmp_path / "run") and "curves.png" not in os.listdir(tmp_path / "run")


@pytest.mark.slow
def test_drawing_error_warns_once(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run/curves.png").mkdir()  # can't be replaced
    drawer = CurvesDrawer(str(tmp_path / "run"))
    drawer.finish()
    drawer.finish()
    assert capsys.readouterr().out.count("WARNING: curves.png can't be drawn") == 1
    assert drawer.process is None


@pytest.mark.slow
def test_training_never_waits_for_drawing_and_drawing_takes_a_small_share_of_time(tmp_path, monkeypatch):
    """The drawing process of this test ends when its stdin is closed."""
    write_run(tmp_path / "run")
    started = []
    popen = subprocess.Popen

    def wait_for_stdin(_command, **options):
        started.append(popen([sys.executable, "-c", "import sys; sys.stdin.read()"], **options | {"stdin": stdin}))
        return started[-1]

    monkeypatch.setattr(drawing.subprocess, "Popen", wait_for_stdin)
    stdin = subprocess.PIPE
    drawer = CurvesDrawer(str(tmp_path / "run"))
    drawer.notice(is_evaluation=True)
    assert not started  # it is too early in the run
    drawer.next_start = time.monotonic()
    for _ in range(100):
        drawer.notice(is_evaluation=True)
    assert len(started) == 1 and started[0].poll() is None
    started[0].stdin.close()
    started[0].wait()
    drawer.notice(is_evaluation=False)
    now = time.monotonic()
    assert len(started) == 1 and drawer.process is None  # another drawing is pending, but it is too early
    assert drawer.next_start - now == pytest.approx(50 * (now - drawer.started), rel=0.2)
    drawer.next_start = now
    drawer.notice(is_evaluation=False)
    assert len(started) == 2
    started[1].stdin.close()
    stdin = subprocess.DEVNULL
    drawer.finish()
    assert len(started) == 3 and drawer.process is None


@pytest.mark.slow
def test_stopped_run_waits_only_briefly_and_leaves_no_half_drawn_picture(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    popen = subprocess.Popen
    script = "import os, time; open(f'curves.png.partial-{os.getpid()}', 'w').close(); time.sleep(600)"

    def endless(_command, **options):
        return popen([sys.executable, "-c", script], **{**options, "cwd": tmp_path / "run"})

    monkeypatch.setattr(drawing.subprocess, "Popen", endless)
    monkeypatch.setattr(drawing, "_LONGEST_AFTER_FAILURE", 1)
    before = time.monotonic()
    CurvesDrawer(str(tmp_path / "run")).finish(failed=True)
    assert time.monotonic() - before < 300
    assert os.listdir(tmp_path / "run") == []
    assert "WARNING: curves.png can't be drawn" in capsys.readouterr().out


@pytest.mark.slow
def test_curves_need_no_torch(run_python, tmp_path):
    script = "import sys, reporting.curves, reporting.compare; print('torch' in sys.modules)"
    assert run_python("-c", script, env={"PYTHONPATH": str(REPOSITORY)}).stdout == "False\n"


def test_run_without_a_log_is_an_error(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(NoRuns, match="nothing has been logged"):
        curves.draw(find_runs([str(tmp_path / "run")]), str(tmp_path / "x.png"))
    assert read_jsonl(tmp_path / "run/metrics.jsonl") == []
