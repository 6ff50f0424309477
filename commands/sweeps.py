"""Sweeps (`-m`): the names of their jobs, and the table of what has become of them."""

import contextlib
import hashlib
import json
import os
import re
import sys
from datetime import timedelta

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from utils import rank0_print

METRICS = ("loss/eval", "rewards_eval/accuracies")  # what the table shows of a job's last evaluation
_LONGEST_NAME = 150  # characters; file systems take 255 bytes


def in_sweep() -> bool:
    """Whether what runs now is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job_overrides() -> dict[str, str]:
    """What the sweep varies, as it is in this job: {'loss.beta': '0.1', ...}."""
    parser, varied = OverridesParser.create(), set(HydraConfig.get().sweeper.get("params") or {})
    for word in sys.argv[1:]:
        with contextlib.suppress(HydraException):  # options with a minus
            override = parser.parse_override(word)
            varied |= {override.get_key_element()} if override.is_sweep_override() else set()
    job = [parser.parse_override(word) for word in OmegaConf.to_container(HydraConfig.get().overrides.task)]
    return {o.key_or_group: o.get_value_element_as_str() for o in job if o.get_key_element() in varied}


def job_name() -> str:
    """The job's overrides as the name of a directory, such that its path can be typed in an override."""
    overrides = [f"{key}-{value}" for key, value in job_overrides().items()]
    name = re.sub(r"[^\w.+-]+", "_", "_".join(overrides)) or f"job_{OmegaConf.select(HydraConfig.get(), 'job.num')}"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


class SweepLog:
    """What has become of a sweep's jobs, also when it goes on later: `sweep.jsonl`, and a table."""

    def __init__(self, directory: str):
        self.path, self.rows = os.path.join(directory, "sweep.jsonl"), {}
        with contextlib.suppress(FileNotFoundError), open(self.path, encoding="utf-8") as file:
            self.rows = {row["overrides"]: row for row in map(json.loads, file)}

    def add(self, run_dir: str, overrides: str, status: str, seconds: float):
        """Record how a job has ended, now, after so long."""
        last = _last_evaluation(run_dir)
        self.rows[overrides] = {
            "job": os.path.basename(run_dir),
            "overrides": overrides,
            "status": status,
            **{name: last.get(name) for name in METRICS},
            "seconds": round(seconds + self.rows.get(overrides, {}).get("seconds", 0), 1),
            "local_run_dir": run_dir,
        }
        try:
            with open(f"{self.path}.partial", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())
            os.replace(f"{self.path}.partial", self.path)
        except OSError as error:
            rank0_print(f"WARNING: can't write {self.path}: {error}")

    def table(self) -> str:
        """A line for each job."""
        lines = [("job", "overrides", "status", *METRICS, "time")]
        for row in self.rows.values():
            metrics = ["-" if row[name] is None else f"{row[name]:.4f}" for name in METRICS]
            time = str(timedelta(seconds=round(row["seconds"])))
            lines.append((row["job"], row["overrides"], row["status"], *metrics, time))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _last_evaluation(run_dir: str) -> dict[str, float]:
    """The metrics of a run's last evaluation; none where there was none."""
    last = {}
    path = os.path.join(run_dir, "metrics.jsonl")
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # cut off by a crash
                row = json.loads(line)
                last = row if row["split"] == "eval" else last
    return last
