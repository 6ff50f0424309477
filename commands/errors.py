"""Errors that end a command: a user's mistake as its message, a bug as its traceback, a signal as an exit code."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from checkpointing.preemption import EXIT_CODE, Stopped
from config_checks.explanations import explain_hydra_error
from distributed import environment, heartbeat
from utils import UserError, rank0_print

# asked for by HYDRA_FULL_ERROR=1, which `main` then sets for reasons of its own; workers ask their parent's
SHOWS_TRACEBACK = os.environ.setdefault("DPO_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"


@contextlib.contextmanager
def errors_reported() -> Iterator[None]:
    """Let errors end the process (SystemExit) once they have been printed, a bug's with its traceback.

    A user's mistake, a lost connection and a signal are told in a message alone.
    """
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        heartbeat.wait_for_root_cause(error)
        if SHOWS_TRACEBACK:
            raise
        message = str(error) if isinstance(error, UserError) else explain_hydra_error(error)
        sys.exit("\n".join([f"error: {message}", *getattr(error, "__notes__", [])]))
    except Stopped as stopped:
        rank0_print("\n".join([f"stopped by {stopped}", *getattr(stopped, "__notes__", [])]), file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        is_consequence = heartbeat.is_lost_connection(error)
        if is_consequence and environment.is_local_rank0():
            message = f"error: another worker is gone ({str(error)[:200]}); what it or its launcher printed says why"
            print("\n".join([message, *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
        heartbeat.wait_for_root_cause(error)
        if SHOWS_TRACEBACK:
            raise
        if not is_consequence:
            traceback.print_exc()
        sys.exit(1)
