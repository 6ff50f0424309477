"""Runs as they lie on the disk: finding them, their metrics, and the keys in which they differ.

It needs no torch, so that it starts at once.
"""

import contextlib
import glob
import os
from dataclasses import dataclass

import yaml

from storage.files import read_json_lines

# keys that say where a run is and how it is watched, not what it is
_NOT_OF_THE_RUN = (
    "local_run_dir", "local_dirs", "exp_name", "resume", "resume_anyway", "wandb.", "tensorboard.", "curves", "debug",
    "minimum_log_interval_secs", "fsdp_port", "worker_timeout", "keep_checkpoints", "save_every", "save_optimizer",
    "sample_during_eval", "n_eval_model_samples", "do_first_eval",
)  # fmt: skip


class NoRuns(ValueError):
    """What was given names no run; the message says so."""


@dataclass
class Run:
    """A run directory's config, flat, and the lines of its metrics.jsonl by their split."""

    directory: str
    config: dict[str, object]
    train: list[dict[str, float]]
    eval: list[dict[str, float]]
    label: str = ""


def read_run(directory: str) -> Run:
    """A run as it stands, which may still go on.

    Raises: NoRuns if the directory holds none.
    """
    lines: dict[str, list[dict]] = {"train": [], "eval": []}
    path = os.path.join(directory, "metrics.jsonl")
    try:
        for line, _ in read_json_lines(path, skips_damaged=True):
            with contextlib.suppress(KeyError, TypeError):
                lines[line["split"]].append(line)
    except OSError as error:
        raise NoRuns(f"{directory}: no run that has logged anything: {error}") from error
    config = {}
    with contextlib.suppress(OSError, yaml.YAMLError), open(os.path.join(directory, "config.yaml")) as file:
        flat = flatten(yaml.safe_load(file) or {})
        config = {key: value for key, value in flat.items() if value != {}}
    name = os.path.basename(os.path.normpath(os.path.abspath(directory)))
    return Run(directory, config, lines["train"], lines["eval"], name)


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """Return a config with one level of keys: {'loss.beta': 0.1, ...}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def find_runs(paths: list[str]) -> list[Run]:
    """The runs that paths, patterns and the directories of sweeps name, each once, labelled by what sets it apart.

    Raises: NoRuns if one of them names none.
    """
    directories: dict[str, None] = {}
    for given in paths:
        matches = [given] if os.path.exists(given) else sorted(glob.glob(given))
        found = [directory for match in matches for directory in _run_dirs(match)]
        if not found:
            raise NoRuns(f"{given}: no run directory, nor a directory or pattern of some: none has a metrics.jsonl")
        directories |= dict.fromkeys(map(os.path.normpath, found))
    runs = [read_run(directory) for directory in directories]
    keys = differing_keys(runs)
    if len(runs) > 1 and keys:
        labels = [", ".join(f"{key}={shown(run.config.get(key))}" for key in keys) for run in runs]
        for run, label in zip(runs, labels, strict=True):
            run.label = label if labels.count(label) == 1 else f"{label} ({run.label})"
    return runs


def _run_dirs(path: str) -> list[str]:
    """The path itself if it is a run's, else the runs in it."""
    if os.path.exists(os.path.join(path, "metrics.jsonl")):
        return [path]
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    return [d for d in (os.path.join(path, name) for name in names) if os.path.exists(os.path.join(d, "metrics.jsonl"))]


def differing_keys(runs: list[Run]) -> list[str]:
    """The keys of which not all runs have the same value, in their order in the config."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not key.startswith(_NOT_OF_THE_RUN))
    return [key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)]


def shown(value: object) -> str:
    """A config's value as it is typed; of a long path only its end."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"
