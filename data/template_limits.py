"""Limit the time and the output of chat templates, which are programs written by strangers.

Jinja's sandbox keeps a template from harming the machine, but not from looping forever.
"""

import contextlib
import ctypes
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from utils import UserError

SECONDS = 20  # for one row, which usually takes less than a millisecond
_MAX_LENGTH = 1_000_000  # characters of output; longer texts are refused if they also exceed
_MAX_FACTOR = 100  # characters of output per character of input
_TICK = 0.5  # seconds
_REMEDY = "correct the template, or give another: chat_template=FILE"


class TemplateLimit(UserError):
    """Raised if a chat template takes too long, or writes too much."""


@contextlib.contextmanager
def limited(template: str) -> Iterator[None]:
    """Limit the time that this thread may spend inside the block.

    Args:
        template: the template's name in the error message.

    Raises: TemplateLimit.
    """
    try:
        try:
            _watch.start()
            yield
        finally:
            _watch.stop()
    except _TooLong:
        _watch.stop()  # again, because the exception may have interrupted the call above
    else:
        return
    raise TemplateLimit(f"{template} takes more than {SECONDS} seconds to render; {_REMEDY}")


def check_length(text: str, template: str, *given: object):
    """Raise TemplateLimit if a rendered text is long, and out of proportion to the template's input."""
    if len(text) > _MAX_LENGTH and len(text) > _MAX_FACTOR * (n_given := len(json.dumps(given, default=str))):
        raise TemplateLimit(f"{template} writes {len(text):,} characters from an input of {n_given:,}; {_REMEDY}")


class _TooLong(BaseException):
    """Raised in the thread that renders; not an Exception, so that Jinja doesn't catch it."""


@dataclass
class _Watch:
    """Raises `_TooLong` in threads that render for too long.

    A signal would reach only the main thread. The watching thread counts its own ticks, so that time in which the
    process is stopped doesn't count. It ends when no thread renders. A call of a C function can't be interrupted.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    ticks: dict[int, int] = field(default_factory=dict)  # by the id of each rendering thread
    thread: threading.Thread | None = None

    def start(self):
        """Watch this thread from now on."""
        with self.lock:
            self.ticks[threading.get_ident()] = 0
            if self.thread is None or not self.thread.is_alive():  # after a fork, the thread is missing
                self.thread = threading.Thread(target=self._watch, daemon=True)
                self.thread.start()

    def stop(self):
        """Stop watching this thread, and cancel an exception that is still to be raised in it."""
        with self.lock:
            if self.ticks.pop(threading.get_ident(), 0) * _TICK > SECONDS:
                _raise_in_thread(threading.get_ident(), None)

    def _watch(self):
        while True:
            time.sleep(_TICK)
            with self.lock:
                if not self.ticks:
                    self.thread = None
                    return
                for thread in self.ticks:
                    self.ticks[thread] += 1
                    if self.ticks[thread] * _TICK > SECONDS:
                        _raise_in_thread(thread, _TooLong)


def _raise_in_thread(thread: int, exception: type[BaseException] | None):
    argument = None if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), argument)


_watch = _Watch()
