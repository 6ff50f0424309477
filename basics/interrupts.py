"""End a command on Ctrl-C without a traceback, even during its imports, which take seconds."""

import contextlib
import signal
import sys
from collections.abc import Iterator

INTERRUPTED = 130  # the exit code after Ctrl-C, as shells have it


def let_interrupts_end_the_process():
    """Let Ctrl-C end the process at once until `interrupts_reported`; commands call this before their other imports.

    Some libraries swallow a KeyboardInterrupt in their imports, or turn it into another error.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # shells let background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def interrupts_reported() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block; if nothing catches it, print "interrupted" and exit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
