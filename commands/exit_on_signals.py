"""Signals that end a process which has nothing to save. (Training stops by `checkpointing.stop_signal.StopSignal`.)"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

from basics.interrupts import INTERRUPTED
from checkpointing.stop_signal import EXIT_CODE
from utils import signals_handled


@contextlib.contextmanager
def exit_on_signals(interrupted: int = INTERRUPTED) -> Iterator[None]:
    """Let signals end this process by SystemExit, which removes unfinished files and child processes.

    Args:
        interrupted: the exit code after Ctrl-C; after other signals it is `EXIT_CODE`.
    """

    def end(number: int, _frame):
        with contextlib.suppress(OSError):  # nobody may read it any more
            os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())  # a print may be under way
        for child in multiprocessing.active_children():
            child.kill()
        sys.exit(interrupted if number == signal.SIGINT else EXIT_CODE)

    with signals_handled(end):
        yield
