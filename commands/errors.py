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

# the user's HYDRA_FULL_ERROR=1, read before `main` sets that itself; workers inherit the variable DPO_FULL_ERROR
SHOWS_TRACEBACK = os.environ.setdefault("DPO_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"
_TOO_MANY_FILES = "too many open files: raise the limit on open files (ulimit -n)"


@contextlib.contextmanager
def errors_reported(interrupted: int = EXIT_CODE) -> Iterator[None]:
    """Print errors raised inside, then end the process (SystemExit). Only a bug gets its traceback printed.

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
