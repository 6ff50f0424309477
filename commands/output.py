"""Standard output and error that never end a run, even if nobody can read them any more."""

import contextlib
import io
import logging
import os
import sys
import threading

from basics.files import has_no_room
from basics.printing import printable


class _UnneededOutput(io.FileIO):
    """A file descriptor that is written to as long as that works; later writes are dropped."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:  # the reader of a pipe has ended, a terminal is gone, a disk is full
            with contextlib.suppress(OSError):  # the other stream may have no reader, either
                text = f"WARNING: nothing more is printed ({error}); the run continues, and still writes its files\n"
                os.write({1: 2, 2: 1}[self.fileno()], text.encode())
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for other writers: libraries, signal handlers, workers
            os.close(nowhere)
            return len(memoryview(data))


def keep_output_going():
    """Keep `print` from raising on characters that the terminal can't show or a reader that is gone (`| head`)."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        elif stream.fileno() == descriptor:
            stream.flush()
            buffer = io.BufferedWriter(_UnneededOutput(descriptor, "w", closefd=False))
            # line by line, as a job's log file is read while it is written
            flushing = {"line_buffering": True, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", **flushing))


def _report_failed_thread(failed: threading.ExceptHookArgs):
    """Print why a thread failed; of a full disk one line, as the code that waits for the thread gets the error, too."""
    if has_no_room(failed.exc_value):
        print(printable(f"WARNING: {failed.exc_value}"), file=sys.stderr)
    else:
        threading.__excepthook__(failed)


def quiet_libraries():
    """Turn off the progress bars of libraries; those of downloads, which may take long, only without a terminal.

    On a full disk, the threads and logs of trackers print no tracebacks, either.
    """
    import huggingface_hub
    import transformers

    logging.raiseExceptions, threading.excepthook = False, _report_failed_thread
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read at its import, which takes half a second
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
