"""Stopping on a signal so that the run can go on later."""

import contextlib
import os
import signal

from distributed import collectives

EXIT_CODE = 75  # of a run that a signal stopped; EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: what a scheduler is told to send before it kills


class Stopped(Exception):
    """A signal asked the run to stop, and what it has done so far is on disk."""


class StopSignal:
    """Inside `with`, a first signal sets `received`, for training to act on; a second ends the process."""

    def __init__(self):
        self.received: str | None = None

    def __enter__(self):
        self.former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame):
        self.received = signal.Signals(number).name
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        text = f"\n{self.received}: stopping after this step and a save; once more ends the run at once\n"
        with contextlib.suppress(OSError):  # whoever read it may be gone
            os.write(1, text.encode())  # print could be in the middle of something

    def check(self):
        """Raises Stopped if a signal has come, to any worker; all must call it."""
        if collectives.all_reduce_max(int(self.received is not None)):
            raise Stopped(self.received or "a signal to another worker")
