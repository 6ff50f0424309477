"""Errors that end a command: a user's mistake as its message, a bug as its traceback, a signal as an exit code."""

import contextlib
import os
import sys
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

# the user's HYDRA_FULL_ERROR=1, read before `main` sets it itself; workers read their parent's
SHOWS_TRACEBACK = os.environ.setdefault("DPO_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"


@contextlib.contextmanager
def errors_reported(interrupted: int = EXIT_CODE) -> Iterator[None]:
    """Let errors end the process (SystemExit) once they have been printed, a bug's with its traceback.

    For a user's mistake, a lost connection and a signal, only the message is printed.

    Args:
        interrupted: the exit code after a Ctrl-C that the work has ended at; after other signals it is `EXIT_CODE`.
    """
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        heartbeat.wait_for_root_cause(error)
        if SHOWS_TRACEBACK:
            raise
        message = str(error) if isinstance(error, UserError) else explain_hydra_error(error)
        if is_short_of_files(error):
            message = f"{message}\n{_TOO_MANY_FILES}"
        sys.exit(printable("\n".join([f"error: {message}", *getattr(error, "__notes__", [])])))
    except Stopped as stopped:
        rank0_print("\n".join([f"stopped by {stopped}", *getattr(stopped, "__notes__", [])]), file=sys.stderr)
        sys.exit(interrupted if str(stopped) == "SIGINT" else EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        is_consequence = heartbeat.is_lost_connection(error)
        if is_consequence and environment.is_local_rank0():
            message = f"error: another worker is gone ({str(error)[:200]}); what it or its launcher printed says why"
            text = "\n".join([message, *getattr(error, "__notes__", [])])
            print(printable(text), file=sys.stderr, flush=True)
        heartbeat.wait_for_root_cause(error)
        if SHOWS_TRACEBACK:
            raise
        if explanation := _explained(error):
            notes = getattr(error, "__notes__", [])
            sys.exit(printable("\n".join([f"error: {explanation}", *notes])))
        if not is_consequence:
            print(printable(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        sys.exit(1)


_FILES_TO_SPARE = 8  # the failed code may have closed some of its files already
_TOO_MANY_FILES = "too many open files: raise the limit on open files (ulimit -n)"


def _can_open_files() -> bool:
    """False if this process is at its limit of open files, which libraries report as errors of many kinds."""
    descriptors = []
    try:
        for _ in range(_FILES_TO_SPARE):
            descriptors.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return True


def _explained(error: Exception) -> str | None:
    """Return an error's message if the machine is the cause: too many open files, a full disk, no memory left."""
    if is_short_of_files(error) or not _can_open_files():
        return _TOO_MANY_FILES
    if has_no_room(error):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{explain_failed_write(error)}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return f"the machine's memory, or a limit on it (ulimit -v, a cgroup), is exhausted: {str(error) or 'no room'}"
    return None
