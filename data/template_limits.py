"""Limits for rendering chat templates, which are a stranger's programs: time, memory, and the length of the output.

Jinja's sandbox keeps a template from the machine, but not from looping without end or filling the memory.
"""

import contextlib
import ctypes
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from utils import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS = 20  # for one row, which usually takes less than a millisecond
_MEMORY = 2**30  # bytes, beyond what the process has
_LONGEST, _LARGEST_FACTOR = 1_000_000, 100  # characters, and how many for each that was given
_TICK = 0.5  # seconds
_REMEDY = "correct the template, or give another: chat_template=FILE"


class TemplateLimit(UserError):
    """Raised if a chat template takes too long, needs too much memory, or writes too much."""


@contextlib.contextmanager
def limited(template: str) -> Iterator[None]:
    """Limit time and memory of what is rendered inside, in any thread.

    Args:
        template: its name in the error message.

    Raises: TemplateLimit.
    """
    import data.template_arithmetic  # noqa: F401 (here, as Transformers takes seconds to import)

    try:
        try:
            _watch.start()
            with _memory.limited():
                yield
        finally:
            _watch.stop()
    except _TooLong:
        _watch.stop()  # if the exception was raised in the line above
        reason = f"takes more than {SECONDS} seconds"
    except MemoryError:
        reason = f"needs more than {_MEMORY / 2**30:g} GiB of memory"
    else:
        return
    raise TemplateLimit(f"{template} {reason} to render; {_REMEDY}")


def check_length(text: str, template: str, *given: object):
    """Raise TemplateLimit if a rendered text is long, and out of proportion to what was given to the template."""
    if len(text) > _LONGEST and len(text) > _LARGEST_FACTOR * (n_given := len(json.dumps(given, default=str))):
        raise TemplateLimit(f"{template} writes {len(text):,} characters for {n_given:,}; {_REMEDY}")


# ---- time -----------------------------------------------------------------------------------------------------------


class _TooLong(BaseException):
    """Raised in the thread that renders. It is no Exception, so that Jinja doesn't catch it."""


@dataclass
class _Watch:
    """Raises `_TooLong` in threads that render for too long.

    Signals would only reach the main thread. The watching thread counts its own ticks, so that time in which the whole
    process is stopped doesn't count; it ends once nothing is rendered. A single call of a function in C isn't
    interrupted: `data.template_arithmetic` and the memory limit keep those short.
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
        """Watch this thread no longer; an exception that isn't raised yet never is."""
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


# ---- memory ---------------------------------------------------------------------------------------------------------


@dataclass
class _MemoryLimit:
    """Limits what this process may allocate, beyond what it has, while any of its threads renders.

    Only Linux enforces it.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    n_rendering: int = 0

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        if resource is None:
            yield
            return
        with self.lock:
            if self.n_rendering == 0:
                self.former = resource.getrlimit(resource.RLIMIT_DATA)
                _limit_memory(_allocated() + _MEMORY, *self.former)
            self.n_rendering += 1
        try:
            yield
        finally:
            with self.lock:
                self.n_rendering -= 1
                if self.n_rendering == 0:
                    resource.setrlimit(resource.RLIMIT_DATA, self.former)


def _limit_memory(size: float, *former: int):
    finite = [limit for limit in (size, *former) if limit not in (resource.RLIM_INFINITY, math.inf)]
    resource.setrlimit(resource.RLIMIT_DATA, (int(min(finite, default=former[0])), former[1]))


def _allocated() -> float:
    """Return the memory that this process has allocated in bytes; infinity where the system doesn't tell."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return math.inf
    try:
        return int(os.read(descriptor, 200).split()[5]) * resource.getpagesize()
    finally:
        os.close(descriptor)


_memory = _MemoryLimit()
