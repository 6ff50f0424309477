"""wandb's offline files, read back, hold the runs' records."""

import json
import struct
from pathlib import Path

import pytest
from conftest import read_jsonl
from terminals import run_on_terminal
from test_cli import SHORT

RUN = [*SHORT, "eval_every=4", "warmup_steps=1", "minimum_log_interval_secs=1e-9", "wandb.enabled=true"]

pytestmark = pytest.mark.slow


def read_records(path: Path) -> list:
    """Parse a .wandb file: LevelDB's log format (https://github.com/google/leveldb/blob/main/doc/log_format.md)
    after a header of seven bytes, which belongs to the first block."""
    from wandb.proto.wandb_internal_pb2 import Record  # takes more than a second

    data, place, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:  # a block's end, too small for a record's header
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    assert (place, parts) == (len(data), b"")
    return records


def key(item) -> str:
    return item.key or ".".join(item.nested_key)


class OfflineRun:
    """A recorded run: name, id, project, config, history and exit code."""

    def __init__(self, directory: Path):
        (path,), self.files = directory.glob("*.wandb"), directory / "files"
        records = read_records(path)
        by_kind = {record.WhichOneof("record_type"): record for record in records}
        self.run, self.exit_code = by_kind["run"].run, by_kind["exit"].exit.exit_code
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update}
        self.history = {}  # by step
        for record in records:
            if record.WhichOneof("record_type") == "history":
                values = {key(item): json.loads(item.value_json) for item in record.history.item}
                self.history.setdefault(values["_step"], {}).update(values)


def offline_runs(directory: Path) -> list[OfflineRun]:
    return [OfflineRun(path) for path in sorted(directory.rglob("offline-run-*"))]


@pytest.fixture
def no_account(tmp_path) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir()
    return {"HOME": str(home), "WANDB_API_KEY": "", "NETRC": str(home / "netrc")}


def assert_recorded(run: OfflineRun, run_dir: Path):
    """Check that wandb has all values of metrics.jsonl at the same steps; a step can have training and evaluation."""
    expected = {}
    for line in read_jsonl(run_dir / "metrics.jsonl"):
        expected.setdefault(line["counters/examples"], {}).update({k: v for k, v in line.items() if k != "split"})
    assert sorted(run.history) == sorted(expected)
    for step, values in expected.items():
        assert {k: run.history[step][k] for k in values} == pytest.approx(values)


def test_wandb_records_name_config_and_every_value(train_ok, tmp_path, no_account):
    output = train_ok(*RUN, "loss=dpo", f"local_run_dir={tmp_path}/run", env=no_account)
    assert "WARNING" not in output
    (run,) = offline_runs(tmp_path / "run")
    assert (run.run.display_name, run.run.project) == ("dpo_tiny", "direct-preference-optimization")
    assert run.exit_code == 0
    assert (run.config["lr"], run.config["loss"]["beta"], run.config["model"]["from_scratch"]) == (1e-3, 0.1, True)
    assert_recorded(run, tmp_path / "run")
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    for step in (0, 4, 8):
        for model in ("policy", "reference"):
            table = json.loads((run.files / run.history[step][f"{model}_samples.path"]).read_text())
            of_step = [s for s in samples if (s["counters/examples"], s["model"]) == (step, model)]
            assert table["columns"] == ["step", "prompt", "sample"]
            assert table["data"] == [[step, s["prompt"], s["sample"]] for s in of_step]


@pytest.mark.exhaustive
def test_wandb_records_a_failed_run_with_its_values(train, tmp_path, no_account):
    overrides = ["lr=1e30", "optimizer=SGD", "max_grad_norm=1e30", "warmup_steps=0", "sample_during_eval=false"]
    result = train(*RUN, *overrides, f"local_run_dir={tmp_path}/run", env=no_account)
    assert result.returncode == 1
    (run,) = offline_runs(tmp_path / "run")
    assert run.exit_code == 1
    assert_recorded(run, tmp_path / "run")


@pytest.mark.exhaustive
def test_wandb_records_each_sweep_job_as_a_run(train_ok, tmp_path, no_account):
    short = ["n_examples=8", "sample_during_eval=false", "do_first_eval=false", "loss=dpo", "loss.beta=0.1,0.5"]
    output = train_ok("-m", *RUN, *short, f"hydra.sweep.dir={tmp_path}/sweep", env=no_account)
    assert "WARNING" not in output
    first, second = offline_runs(tmp_path / "sweep")
    assert first.run.run_id != second.run.run_id
    for run, beta in ((first, 0.1), (second, 0.5)):
        assert run.config["loss"]["beta"] == beta
        assert run.run.display_name == f"dpo_tiny loss.beta={beta}"
        assert run.exit_code == 0
        assert_recorded(run, tmp_path / f"sweep/loss.beta-{beta}")


def test_wandb_never_prompts_for_an_account(launcher, tmp_path, no_account):
    screen = run_on_terminal(launcher, *RUN, f"local_run_dir={tmp_path}/run", columns=80, env=no_account)
    assert screen.code == 0
    text = screen.sent.decode()
    assert "logging offline" in text
    assert "wandb login" in text
    assert "WANDB_API_KEY" in text
    assert "Run history" not in text and "Run summary" not in text
    (run,) = offline_runs(tmp_path / "run")
    assert_recorded(run, tmp_path / "run")
    assert "wandb sync " in text
