"""Stop on a signal, so that the run can be resumed."""

import contextlib
import os
import signal

from distributed import collectives
from utils import SIGNALS, signals_handled

EXIT_CODE = 75  # after a signal; EX_TEMPFAIL of sysexits.h: try again later


class Stopped(Exception):
    """A signal asked the run to stop; its progress is on disk."""


class StopSignal:
    """Inside its `with` block, the first signal sets `received`, which training checks; a second ends the process."""

    received: str | None = None  # the signal's name

    def __enter__(self):
        self.handled = signals_handled(self._receive)
        self.handled.__enter__()
        return self

    def __exit__(self, *_):
        self.handled.__exit__(None, None, None)

    def _receive(self, number: int, _frame):
        self.received = signal.Signals(number).name
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        text = f"\n{self.received}: stopping after this step; what is done is saved. A second signal ends it at once\n"
        with contextlib.suppress(OSError):  # the output may be closed
            os.write(1, text.encode())  # a print may be under way

    def check(self):
        """Raise Stopped if any worker received a signal; all workers must call it."""
        if collectives.all_reduce_max(int(self.received is not None)):
            raise Stopped(self.received or "a signal to another worker")
