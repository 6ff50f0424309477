"""Sweeps (`-m`): one job after the other, and a table of how they ended."""

import contextlib
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from basics.files import atomic_file, read_json_lines
from basics.locks import locked_directory
from basics.printing import printable
from checkpointing.resume import SWEEP_DIR, resume_command
from checkpointing.stop_signal import EXIT_CODE
from commands.errors import errors_reported
from commands.exit_on_signals import exit_on_signals
from commands.run_directory import is_run_dir_given, job_overrides
from distributed import environment
from reporting.metric_names import ACCURACY, LOSS
from utils import UserError, on_rank0, rank0_print

METRICS = (LOSS, ACCURACY)  # metrics of a job's last evaluation in the table


class SweepLog:
    """Records how each job of a sweep ended, across resumes: `sweep.jsonl`, and a table."""

    def __init__(self, directory: str):
        self.path, self.rows = os.path.join(directory, "sweep.jsonl"), {}
        with contextlib.suppress(FileNotFoundError):
            self.rows = {row["overrides"]: row for row, _ in read_json_lines(self.path, skips_damaged=True)}

    def add(self, run_dir: str, overrides: str, status: str, seconds: float):
        """Record how a job has ended, after this many seconds."""
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
            with atomic_file(self.path) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values())
        except OSError as error:
            rank0_print(f"WARNING: can't write {self.path}: {error}")

    def table(self) -> str:
        """Return a table with a line for each job."""
        lines = [("job", "overrides", "status", *METRICS, "time")]
        for row in self.rows.values():
            metrics = ["-" if row[name] is None else f"{row[name]:.4f}" for name in METRICS]
            time = str(timedelta(seconds=round(row["seconds"])))
            lines.append((row["job"], row["overrides"], row["status"], *metrics, time))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _last_evaluation(run_dir: str) -> dict[str, float]:
    """Return the metrics of a run's last evaluation, an empty dict if there was none."""
    last = {}
    with contextlib.suppress(FileNotFoundError):
        for row, _ in read_json_lines(os.path.join(run_dir, "metrics.jsonl"), skips_damaged=True):
            last = row if row.get("split") == "eval" else last
    return last


class Sweep:
    """Runs the jobs of a sweep, one after the other: a failing job doesn't stop the others, a signal stops all."""

    def __init__(self, run: Callable[[DictConfig], None]):
        self.run = run
        self.log: SweepLog | None = None
        self.run_dirs: set[str] = set()
        self.complete = True
        self.stack = contextlib.ExitStack()

    def start(self):
        """Lock the sweep's directory, which is known only in the first job."""
        self.directory = os.path.abspath(HydraConfig.get().sweep.dir)
        os.environ[SWEEP_DIR] = self.directory
        if on_rank0():
            origin = f"hydra.sweep.dir={self.directory}"
            self.stack.enter_context(locked_directory(self.directory, origin, "another sweep is running there"))
        self.log = SweepLog(self.directory)
        self.stack.enter_context(exit_on_signals(interrupted=EXIT_CODE))

    def run_job(self, config: DictConfig):
        """Run a job and record how it ended; its errors are printed here.

        Raises: SystemExit after a signal.
        """
        if self.log is None:
            with errors_reported():
                self.start()
        overrides, start = " ".join(f"{key}={value}" for key, value in job_overrides().items()), time.monotonic()
        rank0_print(f"\n== Job {HydraConfig.get().job.num} of the sweep: {overrides}")
        run_dir, status = HydraConfig.get().runtime.output_dir, "failed"
        try:
            with errors_reported():
                run_dir = self._claimed_dir(config)
                self.run(config)
            status = "complete"
        except SystemExit as error:
            if isinstance(error.code, str):
                print(printable(error.code), file=sys.stderr, flush=True)
            status = "stopped" if error.code == EXIT_CODE else "failed"
            if status == "stopped" or environment.is_launched():  # a launcher's other workers could not follow
                raise
        finally:
            self.complete &= status == "complete"
            if on_rank0():
                self.log.add(run_dir, overrides, status, time.monotonic() - start)
            gc.collect()  # frees the trainer's memory, which reference cycles keep, for the next job

    def _claimed_dir(self, config: DictConfig) -> str:
        """Return the directory of a job; no two jobs share one."""
        if config.resume not in (None, "auto"):
            raise UserError(
                f"resume={config.resume}: a sweep resumes all its jobs by resume=auto and hydra.sweep.dir=DIR"
            )
        if environment.is_launched_by_user() and not is_run_dir_given(config):
            raise UserError("a sweep under a launcher needs hydra.sweep.dir=DIR, the same for all workers")
        run_dir = os.path.abspath(config.local_run_dir)
        if run_dir in self.run_dirs:
            raise UserError(
                f"local_run_dir={run_dir}: an earlier job of this sweep wrote there; leave local_run_dir out, or let "
                "it depend on what the sweep varies"
            )
        self.run_dirs.add(run_dir)
        return run_dir

    def report(self):
        """Print the table of jobs and, if some are not complete, the command that resumes them."""
        self.stack.close()
        if self.log is None:
            return
        rank0_print(f"\n== The sweep in {self.directory}\n{self.log.table()}")
        rank0_print(f"\nTo compare its runs: python -m reporting.compare {shlex.quote(self.directory)}")
        if not self.complete:
            command = resume_command({"hydra.sweep.dir": self.directory, "resume": "auto"})
            rank0_print(f"To resume what is not complete: {command}", file=sys.stderr)
