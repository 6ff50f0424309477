"""A command's output: errors as messages, a bug as its traceback, and streams whose failed writes never end a run."""

import contextlib
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from basics.files import explain_failed_write, has_no_room
from basics.interrupts import INTERRUPTED
from basics.printing import printable
from checkpointing.stop_signal import EXIT_CODE, Stopped
from config_checks.explanations import explain_hydra_error
from distributed import environment, heartbeat
from utils import UserError, is_short_of_files, rank0_print

# `main` sets HYDRA_FULL_ERROR itself: the user's value is read first, and kept in DPO_FULL_ERROR, which workers inherit
SHOWS_TRACEBACK = os.environ.setdefault("DPO_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"
_TOO_MANY_FILES = "too many open files: raise the limit on open files (ulimit -n)"


# ---- streams ---------------------------------------------------------------------------------------------------------


class _FailSafeOutput(io.FileIO):
    """Writes to a file descriptor; after the first failed write, drops all others."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:  # a pipe's reader has ended, a terminal is gone, a disk is full
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
            buffer = io.BufferedWriter(_FailSafeOutput(descriptor, "w", closefd=False))
            # line by line, as a job's log file is read while it is written
            flushing = {"line_buffering": True, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", **flushing))


def _report_failed_thread(failed: threading.ExceptHookArgs):
    """Print a failed thread's traceback. If the disk is full, print one line: the error is raised again elsewhere."""
    if has_no_room(failed.exc_value):
        print(printable(f"WARNING: {failed.exc_value}"), file=sys.stderr)
    else:
        threading.__excepthook__(failed)


def quiet_libraries():
    """Turn off libraries' progress bars; downloads, which may take long, keep theirs on a terminal.

    Logging handlers that fail print no tracebacks; threads print them as in `_report_failed_thread`.
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


# ---- errors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def errors_reported(interrupted: int = EXIT_CODE) -> Iterator[None]:
    """Print errors raised inside, a bug with its traceback, then end the process (SystemExit).

    With HYDRA_FULL_ERROR=1, errors are raised as they are.

    Args:
        interrupted: the exit code after work that Ctrl-C stopped; after other signals it is `EXIT_CODE`.
    """
    try:
        yield
    except Stopped as stopped:
        rank0_print(_with_notes(f"stopped by {stopped}", stopped), file=sys.stderr)
        sys.exit(interrupted if str(stopped) == "SIGINT" else EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        is_consequence = heartbeat.is_lost_connection(error)
        if is_consequence and environment.is_local_rank0():
            message = f"error: another worker is gone ({str(error)[:200]}); what it or its launcher printed says why"
            print(printable(_with_notes(message, error)), file=sys.stderr, flush=True)
        heartbeat.wait_for_root_cause(error)
        if SHOWS_TRACEBACK:
            raise
        if explanation := _explained(error):
            sys.exit(printable(_with_notes(f"error: {explanation}", error)))
        if not is_consequence:
            print(printable(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        sys.exit(1)


def _with_notes(message: str, error: BaseException) -> str:
    return "\n".join([message, *getattr(error, "__notes__", [])])


def _explained(error: Exception) -> str | None:
    """Return an error's message if the user or the machine is the cause; None for a bug."""
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        message = str(error) if isinstance(error, UserError) else explain_hydra_error(error)
        return f"{message}\n{_TOO_MANY_FILES}" if is_short_of_files(error) else message
    if is_short_of_files(error):
        return _TOO_MANY_FILES
    if has_no_room(error):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{explain_failed_write(error)}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return f"the machine's memory, or a limit on it (ulimit -v, a cgroup), is exhausted: {str(error) or 'no room'}"
    return None
