"""End a process that has nothing to save on a signal. (Training uses `checkpointing.stop_signal.StopSignal`.)"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

from basics.interrupts import INTERRUPTED
from checkpointing.stop_signal import EXIT_CODE
from utils import SIGNALS, signals_handled


@contextlib.contextmanager
def exit_on_signals(interrupted: int = INTERRUPTED, waits_for_children: bool = False) -> Iterator[None]:
    """Let signals raise SystemExit, so that unfinished files are removed; child processes are ended, too.

    Args:
        interrupted: the exit code after Ctrl-C; after other signals it is `EXIT_CODE`.
        waits_for_children: first ask child processes to end, and wait for them; otherwise they are killed at once.
    """

    def end(received: int, _frame):
        with contextlib.suppress(OSError):  # the output may be closed
            os.write(2, f"stopped by {signal.Signals(received).name}\n".encode())  # a print may be under way
        if waits_for_children:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)  # a second signal ends this process at once
            for child in (children := multiprocessing.active_children()):
                child.terminate()
            for child in children:
                child.join()
        for child in multiprocessing.active_children():
            child.kill()
        sys.exit(interrupted if received == signal.SIGINT else EXIT_CODE)

    with signals_handled(end):
        yield
