"""Sweeps (`-m`) under any of Hydra's sweepers and launchers: each job's result, and a table of how all have ended.

The sweep's main process reads the command line and prints the table. Hydra's launcher runs the jobs, in this process or
in others, which may be on other machines. All of them share the sweep's directory, and `SWEEP` in their environment.
"""

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from basics.files import append_json_lines, read_json_lines
from basics.locks import in_turn, locked_directory
from basics.printing import printable
from basics.repository import REPOSITORY, python_path
from checkpointing.resume import SWEEP, resume_command
from checkpointing.stop_signal import EXIT_CODE
from commands.exit_on_signals import exit_on_signals
from commands.output import errors_reported
from commands.run_directory import is_run_dir_given
from distributed import environment, launch
from reporting.metric_names import ACCURACY, LOSS, larger_is_better
from reporting.runs import after_training, evaluations
from reporting.terminal import aligned
from utils import UserError, on_rank0, rank0_print

METRICS = (LOSS, ACCURACY)  # metrics of a job's last evaluation in the table
_LONGEST_NAME = 150  # characters; file systems take 255 bytes


# ---- the record of a sweep, in its directory -------------------------------------------------------------------------


class SweepLog:
    """Records in `sweep.jsonl` how each job of a sweep ended, also when resumed: the last line of a job counts."""

    def __init__(self, directory: str):
        self.path = os.path.join(directory, "sweep.jsonl")

    def rows(self) -> dict[str, dict]:
        """Return the last row of each job, by its overrides."""
        with contextlib.suppress(FileNotFoundError):
            return {row["overrides"]: row for row, _ in read_json_lines(self.path, skips_damaged=True)}
        return {}

    def add(self, row: dict):
        """Add the row of a job that has ended; `seconds` are added to those of its earlier rows."""
        try:
            with in_turn(self.path):  # other jobs may end at the same time
                before = self.rows().get(row["overrides"], {}).get("seconds", 0)
                append_json_lines(self.path, [row | {"seconds": round(row["seconds"] + before, 1)}])
        except OSError as error:
            rank0_print(f"WARNING: {self.path}: can't record the job's end: {error.strerror}")

    def table(self) -> str:
        """Return a table with a line for each job."""
        lines = [("job", "overrides", "status", *METRICS, "time")]
        for row in self.rows().values():
            metrics = ["-" if row[name] is None else f"{row[name]:.4f}" for name in METRICS]
            duration = str(timedelta(seconds=round(row["seconds"])))
            lines.append((row["job"], row["overrides"], row["status"], *metrics, duration))
        return aligned(lines)


def result_of(run_dir: str, keep_best: str | None) -> float | None:
    """Return the value that a sweeper optimizes: the best of `keep_best`'s metric or, by default, the last loss/eval.

    If the run hasn't been evaluated after training began, return None.
    """
    metric = keep_best or LOSS
    lines = after_training(evaluations(run_dir))
    values = [line[metric] for line in lines if line.get(metric) is not None]
    if not values or keep_best is None:
        return values[-1] if values else None
    return (max if larger_is_better(metric) else min)(values)


# ---- a job -----------------------------------------------------------------------------------------------------------


def run_job(run: Callable[[DictConfig], None], config: DictConfig) -> float | None:
    """Run a job of a sweep and record how it ended; then end this process if it must not begin another job.

    Returns: the job's `result_of`; None if it failed.
    Raises: SystemExit in the sweep's main process, after a signal or, under torchrun or Slurm, after any failure: there
        all workers must run the same jobs.
    """
    in_main_process, in_pool = _Sweep.current is not None, multiprocessing.parent_process() is not None
    if in_pool:  # joblib's pool sets the start method `loky`, which the processes that a job starts can't use
        multiprocessing.set_start_method("spawn", force=True)
    signals = contextlib.nullcontext() if in_main_process else exit_on_signals(interrupted=EXIT_CODE)
    result, status, exit_code = _run_and_record(run, config, signals)
    if in_main_process and (status == "stopped" or (status == "failed" and environment.is_launched())):
        sys.exit(exit_code)
    if in_pool and status == "stopped":
        launch.end_process(EXIT_CODE)  # the pool would give this process the next job
    return result


def _run_and_record(
    run: Callable[[DictConfig], None], config: DictConfig, signals: contextlib.AbstractContextManager
) -> tuple[float | None, str, int | str | None]:
    """Run a job, print its error if it fails, and add its row to the sweep's record.

    Args:
        signals: handles signals during the run.

    Returns: the job's `result_of`; complete, failed or stopped; and the code of the SystemExit that ended it.
    """
    log, start = SweepLog(HydraConfig.get().sweep.dir), time.monotonic()
    overrides = " ".join(f"{key}={value}" for key, value in job_overrides().items())
    run_dir, status, result, exit_code = HydraConfig.get().runtime.output_dir, "failed", None, None
    try:
        with signals, errors_reported():
            rank0_print(f"\n== Job {HydraConfig.get().job.num} of the sweep: {overrides}")
            run_dir = _checked_run_dir(config, overrides, log)
            run(config)
        status, result = "complete", result_of(run_dir, config.keep_best)
    except SystemExit as ended:
        exit_code, status = ended.code, "stopped" if ended.code == EXIT_CODE else "failed"
    finally:
        last = (after_training(evaluations(run_dir)) or [{}])[-1]
        error = exit_code if isinstance(exit_code, str) else None
        if error is not None:
            print(printable(error), file=sys.stderr, flush=True)
        if on_rank0():
            log.add({
                "job": os.path.basename(run_dir), "overrides": overrides, "status": status,
                **{name: last.get(name) for name in METRICS}, "seconds": time.monotonic() - start,
                "local_run_dir": run_dir, "result": result, "error": error, "sweep": sweep_values()["id"],
            })  # fmt: skip
        gc.collect()  # frees the trainer's memory, which reference cycles keep, for the next job
    return result, status, exit_code


def _checked_run_dir(config: DictConfig, overrides: str, log: SweepLog) -> str:
    """Return a job's directory.

    A sweeper may try the same values again. If this sweep has completed them, `resume` is set, so that nothing is left
    to do.

    Raises: UserError if a job of this sweep with other overrides has used the directory, if `resume` names a run, or if
        torchrun's or Slurm's workers would choose different directories.
    """
    if config.resume not in (None, "auto"):
        raise UserError(f"resume={config.resume}: a sweep resumes all its jobs by resume=auto and hydra.sweep.dir=DIR")
    if environment.is_launched_by_user() and not is_run_dir_given(config):
        raise UserError("a sweep under a launcher needs hydra.sweep.dir=DIR, the same for all workers")
    run_dir = os.path.abspath(config.local_run_dir)
    for row in log.rows().values():
        if row["local_run_dir"] == run_dir and row.get("sweep") == sweep_values()["id"]:
            if row["overrides"] != overrides:
                raise UserError(
                    f"local_run_dir={run_dir}: an earlier job of this sweep wrote there; leave local_run_dir out, or "
                    "let it depend on what the sweep varies"
                )
            if row["status"] == "complete":
                config.resume = "auto"
    return run_dir


# ---- what a sweep varies ---------------------------------------------------------------------------------------------


def job_name() -> str:
    """Return a directory name made of the job's overrides, of characters that a shell needs no quotes for."""
    overrides = [f"{key}-{value}" for key, value in job_overrides().items()]
    name = re.sub(r"[^\w.+-]+", "_", "_".join(overrides)) or f"job_{OmegaConf.select(HydraConfig.get(), 'job.num')}"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def job_overrides() -> dict[str, str]:
    """Return the keys that the sweep varies, with this job's values: {'loss.beta': '0.1', ...}."""
    job, fixed = parse_overrides(HydraConfig.get().overrides.task), sweep_values()["fixed"]
    return {o.key_or_group: o.get_value_element_as_str() for o in job if o.key_or_group not in fixed}


def fixed_keys(config: DictConfig) -> list[str]:
    """Return the keys to which a sweep's command line gives one value for all jobs.

    Args:
        config: the sweep's, with Hydra's own keys.
    """
    given = parse_overrides(config.hydra.overrides.task)
    varied = {*(config.hydra.sweeper.get("params") or {}), *(o.key_or_group for o in given if o.is_sweep_override())}
    return sorted({o.key_or_group for o in given} - varied)


def sweep_values() -> dict:
    """Return the `id` of this process's sweep, and its `fixed` keys, as `_Sweep` has set them in the environment."""
    return json.loads(os.environ.get(SWEEP, '{"id": null, "fixed": []}'))


def parse_overrides(words: ListConfig) -> list[Override]:
    """Parse overrides by Hydra's grammar."""
    return OverridesParser.create().parse_overrides(OmegaConf.to_container(words))


# ---- the sweep's main process ----------------------------------------------------------------------------------------


class SweepStart(Callback):
    """Called by Hydra in the sweep's main process before the first job (config.yaml: hydra.callbacks)."""

    def on_multirun_start(self, config: DictConfig, **_):
        """Lock the sweep's directory, and tell the jobs' processes about the sweep."""
        with errors_reported():
            _Sweep.current = _Sweep(config)


class _Sweep:
    """A sweep, in its main process."""

    current: "_Sweep | None" = None

    def __init__(self, config: DictConfig):
        self.stack = contextlib.ExitStack()
        self.directory, self.metric = os.path.abspath(config.hydra.sweep.dir), config.keep_best or LOSS
        _check_sweeper(config, self.metric)
        self.id = f"{time.time():.0f}-{os.getpid()}"
        os.environ[SWEEP] = json.dumps({"id": self.id, "fixed": fixed_keys(config)})
        # other processes find our modules, wherever the command was given
        os.environ["PYTHONPATH"] = python_path()
        if on_rank0():
            origin = f"hydra.sweep.dir={self.directory}"
            self.stack.enter_context(locked_directory(self.directory, origin, "another sweep is running there"))
        self.log = SweepLog(self.directory)
        self.stack.enter_context(exit_on_signals(interrupted=EXIT_CODE, waits_for_children=True))

    def report(self):
        """Print the table of jobs and, if some are not complete, the command that resumes them.

        Raises: SystemExit if a job failed or was stopped.
        """
        self.stack.close()
        rows = [row for row in self.log.rows().values() if row.get("sweep") == self.id] if on_rank0() else []
        if not rows:
            return
        rank0_print(f"\n== The sweep in {self.directory}\n{self.log.table()}\n")
        for row in rows:
            if row["error"]:
                rank0_print(printable(f"{row['overrides']}: {row['error']}"))
        if best := _best_job(rows, self.metric):
            rank0_print(best)
        rank0_print(f"To compare its runs, in {REPOSITORY}: python -m reporting.compare {shlex.quote(self.directory)}")
        statuses = {row["status"] for row in rows}
        if statuses != {"complete"}:
            command = resume_command({"hydra.sweep.dir": self.directory, "resume": "auto"})
            rank0_print(f"To resume the incomplete jobs: {command}", file=sys.stderr)
            sys.exit(EXIT_CODE if "stopped" in statuses else 1)


def _best_job(rows: list[dict], metric: str) -> str | None:
    """Return the line that names the best of the complete jobs; None if none has a value.

    If the sweep varies the loss, its jobs' losses have different scales, so accuracy decides instead.
    """
    column, note = "result", ""
    if metric == LOSS and any(re.search(r"(^| )loss[.=]", row["overrides"]) for row in rows):
        column, metric, note = ACCURACY, ACCURACY, "; losses can't be compared between these jobs"
    complete = [row for row in rows if row["result"] is not None]
    results = {row["overrides"]: row[column] for row in complete if row[column] is not None}
    if not results:
        return None
    best = (max if larger_is_better(metric) else min)(results, key=results.get)
    return f"Best by {metric}: {best} ({results[best]:.4f}{note})"


def report():
    """Report this process's sweep, if it is a sweep's main process; see `_Sweep.report`."""
    if _Sweep.current is not None:
        _Sweep.current.report()


def _check_sweeper(config: DictConfig, metric: str):
    """Refuse a sweeper that optimizes in the wrong direction or, under torchrun or Slurm, gives workers different jobs.

    Raises: UserError naming the key and the remedy.
    """
    sweeper = config.hydra.sweeper
    if environment.is_launched_by_user() and not sweeper._target_.endswith(".BasicSweeper"):
        raise UserError(
            f"hydra/sweeper: under a launcher each worker would choose values of its own ({sweeper._target_}); start "
            "the sweep without the launcher"
        )
    if (direction := OmegaConf.select(config, "hydra.sweeper.direction")) is None:
        return
    expected = "maximize" if larger_is_better(metric) else "minimize"
    given = str(getattr(direction, "name", direction))
    if given != expected:
        raise UserError(
            f"hydra.sweeper.direction={given}: a job returns {metric}, the metric that keep_best names (by default "
            f"{LOSS}): give hydra.sweeper.direction={expected}, or another metric"
        )
