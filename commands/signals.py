"""Signals that end a command which has nothing to save. (Training stops by `checkpointing.preemption.StopSignal`.)"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

from checkpointing.preemption import EXIT_CODE

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end this process by SystemExit, which removes unfinished files and child processes."""

    def end(number: int, _frame):
        with contextlib.suppress(OSError):  # nobody may read it any more
            os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())  # a print may be under way
        for child in multiprocessing.active_children():
            child.kill()
        sys.exit(EXIT_CODE)

    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
