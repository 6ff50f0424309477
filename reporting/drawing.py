"""Draw `curves.png` in the run directory during training, in a separate process, so that training never waits."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from basics.repository import REPOSITORY, python_path
from reporting.terminal import warning

_SHARE = 0.02  # of the run's time that drawing may take
_FIRST_AFTER = 100.0  # seconds of training before the first picture
_LONGEST, _LONGEST_AFTER_FAILURE = 60, 5  # seconds to wait for the last picture; a stopped job may be killed soon


class CurvesDrawer:
    """Draws curves after evaluations, in at most 2 % of the run's time, and once more at the end."""

    def __init__(self, run_dir: str):
        self.run_dir = os.path.abspath(run_dir)
        self.process: subprocess.Popen | None = None
        self.started, self.next_start = 0.0, time.monotonic() + _FIRST_AFTER
        self.is_due, self.can_draw = False, importlib.util.find_spec("matplotlib") is not None
        if not self.can_draw:
            tqdm.write("No curves.png, as matplotlib is not installed: pip install matplotlib, or pass curves=false")

    def notice(self, is_evaluation: bool):
        """Note a step or an evaluation; start drawing if it is time. Return at once."""
        self.is_due |= is_evaluation
        if self.process is not None and self.process.poll() is not None:
            self._reap()
        if self.is_due and self.process is None and time.monotonic() >= self.next_start:
            self._draw()

    def finish(self, failed: bool = False):
        """Draw the last picture and wait for it; if the run `failed` or was stopped, wait only briefly."""
        longest = _LONGEST_AFTER_FAILURE if failed else _LONGEST
        self._wait(longest)
        self._draw()
        self._wait(longest)

    def _draw(self):
        self.is_due = False
        if not self.can_draw:
            return
        self.started = time.monotonic()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
        command = [sys.executable, "-m", "reporting.curves", self.run_dir]
        try:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._give_up(str(error))
            return
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, self.process.pid, 10)  # training comes first

    def _wait(self, longest: float):
        if self.process is None:
            return
        try:
            self.process.wait(timeout=longest)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            for partial in Path(self.run_dir).glob("curves.png.partial-*"):
                partial.unlink(missing_ok=True)
        self._reap()

    def _reap(self):
        """Choose the next start from the time that the finished process took; stop drawing if it failed."""
        now = time.monotonic()
        self.next_start = now + (now - self.started) / _SHARE
        message = self.process.stderr.read().decode(errors="replace").strip().splitlines()
        if self.process.returncode != 0:
            self._give_up(message[-1] if message else f"exit code {self.process.returncode}")
        self.process.stderr.close()
        self.process = None

    def _give_up(self, why: str):
        self.can_draw = False
        tqdm.write(warning(f"curves.png can't be drawn, and won't be tried again in this run: {why[:300]}"))
