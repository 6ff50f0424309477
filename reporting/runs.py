"""Find runs on disk, read their metrics, and find the keys that tell them apart. It starts fast, without torch."""

import contextlib
import glob
import itertools
import os
from dataclasses import dataclass

from basics.files import read_json_lines
from basics.printing import printable
from basics.saved_config import flatten, read_saved_config

# keys of paths, logging, checkpoints and samples, which don't change a run's numbers
_IGNORED_KEYS = (
    "local_run_dir", "local_dirs", "exp_name", "resume", "resume_anyway", "wandb.", "tensorboard.", "curves", "debug",
    "minimum_log_interval_secs", "fsdp_port", "worker_timeout", "keep_checkpoints", "save_every", "save_optimizer",
    "sample_during_eval", "n_eval_model_samples", "do_first_eval", "checkpoint_format", "checkpoint_async",
)  # fmt: skip
_LONGEST_LABEL = 60  # characters
_LONGEST_VALUE = 40


class NoRuns(ValueError):
    """No run can be shown; the message says why."""


@dataclass
class Run:
    """A run's config, with flat keys, and the lines of its metrics.jsonl by split."""

    directory: str
    config: dict[str, object]
    train: list[dict[str, float]]
    eval: list[dict[str, float]]
    label: str = ""


def evaluations(run_dir: str) -> list[dict[str, float]]:
    """Return a run's evaluations, lines of its metrics.jsonl; an empty list if it has logged nothing."""
    try:
        return read_run(run_dir).eval
    except NoRuns:
        return []


def after_training(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Leave out the evaluation before the first step, which neither `keep_best` nor comparisons count."""
    return [line for line in lines if line["counters/examples"] > 0]


def last_evaluation(run_dir: str) -> dict[str, float]:
    """Return a run's last evaluation; an empty dict if there is none."""
    return (evaluations(run_dir) or [{}])[-1]


def read_run(directory: str) -> Run:
    """Read a run, which may still be training.

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
    with contextlib.suppress(Exception):  # the config is missing, damaged, or refused for what it contains
        flat = flatten(read_saved_config(os.path.join(directory, "config.yaml")))
        config = {key: value for key, value in flat.items() if value != {}}
    name = os.path.basename(os.path.normpath(os.path.abspath(directory)))
    return Run(directory, config, lines["train"], lines["eval"], name)


def find_runs(paths: list[str]) -> list[Run]:
    """Find the runs in the given directories, sweeps and patterns, each once; label them by the keys that differ.

    Of several directories, those without a run are left out: the shell's `SWEEP/*` also names jobs that have failed.

    Raises: NoRuns if a path names none.
    """
    directories: dict[str, None] = {}
    remedy = "give a run directory (with a metrics.jsonl), a sweep directory or a pattern"
    for given in paths:
        matches = [given] if os.path.exists(given) else sorted(glob.glob(given))
        found = [directory for match in matches for directory in _run_dirs(match)]
        if not found and not os.path.isdir(given):
            raise NoRuns(f"{given}: no run there; {remedy}")
        directories |= dict.fromkeys(map(os.path.normpath, found))
    if not directories:
        raise NoRuns(f"{', '.join(paths)}: no run there; {remedy}")
    runs = [read_run(directory) for directory in directories]
    _label(runs)
    return runs


def _label(runs: list[Run]):
    """Label runs by the keys that tell them apart; if these labels are too long, keep the names of directories."""
    keys = distinguishing_keys(runs)
    if len(runs) < 2 or not keys:
        return
    columns = [short_values([run.config.get(key) for run in runs]) for key in keys]
    labels = [", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
              for values in zip(*columns, strict=True)]  # fmt: skip
    names = [run.label for run in runs]
    if max(map(len, labels)) > _LONGEST_LABEL and len(set(names)) == len(names):
        return
    for run, label in zip(runs, labels, strict=True):
        run.label = label if labels.count(label) == 1 else f"{label} ({run.label})"


def _run_dirs(path: str) -> list[str]:
    """Return the path itself if it is a run directory, otherwise the run directories in it."""
    if os.path.exists(os.path.join(path, "metrics.jsonl")):
        return [path]
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    return [d for d in (os.path.join(path, name) for name in names) if os.path.exists(os.path.join(d, "metrics.jsonl"))]


def differing_keys(runs: list[Run]) -> list[str]:
    """Return the keys whose values differ between runs, in their order in the config."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not key.startswith(_IGNORED_KEYS))
    return [key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)]


def distinguishing_keys(runs: list[Run]) -> list[str]:
    """Return enough keys to tell the runs apart, the shortest first; other keys may differ along with these.

    The seed explains nothing: it is included only if the other keys don't tell all runs apart.
    """
    columns = {key: short_values([run.config.get(key) for run in runs]) for key in differing_keys(runs)}
    chosen: list[str] = []
    groups = [()] * len(runs)  # each run's values of the chosen keys
    for key in sorted(columns, key=lambda key: (key == "seed", len(key) + max(map(len, columns[key])))):
        finer = [(*group, value) for group, value in zip(groups, columns[key], strict=True)]
        if len(set(finer)) > len(set(groups)):
            chosen.append(key)
            groups = finer
    return chosen


def short_values(values: list[object]) -> list[str]:
    """Format values for a table: paths are cut to the parts that differ, other long values to their end."""
    texts = [printable(_as_on_command_line(value)) for value in values]
    paths = {text: text.split("/") for text in texts if text != "null"}
    if all(len(parts) > 1 for parts in paths.values()):
        for _ in range(2):  # cut off equal beginnings, then equal ends
            n_equal = _n_equal_parts([*paths.values()])
            paths = {text: parts[n_equal:][::-1] for text, parts in paths.items()}
        texts = ["/".join(paths.get(text, [text])) for text in texts]
    return [text if len(text) <= _LONGEST_VALUE else f"…{text[1 - _LONGEST_VALUE :]}" for text in texts]


def _n_equal_parts(paths: list[list[str]]) -> int:
    """Return the number of leading parts that all paths share, not counting any path's last part."""
    n_equal = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    return min([n_equal, *(len(parts) - 1 for parts in paths)])


def _as_on_command_line(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
