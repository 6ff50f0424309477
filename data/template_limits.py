"""Limits for rendering chat templates, which are a stranger's programs: time, and the length of the output.

Jinja's sandbox keeps a template from the machine, but not from looping without end.
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
_LONGEST, _LARGEST_FACTOR = 1_000_000, 100  # characters, and how many for each that was given
_TICK = 0.5  # seconds
_REMEDY = "correct the template, or give another: chat_template=FILE"


class TemplateLimit(UserError):
    """Raised if a chat template takes too long, or writes too much."""


@contextlib.contextmanager
def limited(template: str) -> Iterator[None]:
    """Limit the time of what is rendered inside, in any thread.

    Args:
        template: its name in the error message.

    Raises: TemplateLimit.
    """
    try:
        try:
            _watch.start()
            yield
        finally:
            _watch.stop()
    except _TooLong:
        _watch.stop()  # if the exception was raised in the line above
    else:
        return
    raise TemplateLimit(f"{template} takes more than {SECONDS} seconds to render; {_REMEDY}")


def check_length(text: str, template: str, *given: object):
    """Raise TemplateLimit if a rendered text is long, and out of proportion to what was given to the template."""
    if len(text) > _LONGEST and len(text) > _LARGEST_FACTOR * (n_given := len(json.dumps(given, default=str))):
        raise TemplateLimit(f"{template} writes {len(text):,} characters for {n_given:,}; {_REMEDY}")


class _TooLong(BaseException):
    """Raised in the thread that renders. It is no Exception, so that Jinja doesn't catch it."""


@dataclass
class _Watch:
    """Raises `_TooLong` in threads that render for too long.

    Signals would only reach the main thread. The watching thread counts its own ticks, so that time in which the whole
    process is stopped doesn't count; it ends once nothing is rendered. A single call of a function in C isn't
    interrupted.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    ticks: dict[int, int] = field(default_factory=dict)  # of each rendering thread, by its id
    thread: threading.Thread | None = None

    def start(self):
        """Watch this thread from now on."""
        with self.lock:
            self.ticks[threading.get_ident()] = 0
            if self.thread is None or not self.thread.is_alive():  # a forked process has lost it
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
