"""Write a checkpoint while training continues."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background(contextlib.AbstractContextManager):
    """Runs one function at a time in a thread; the end of its `with` block waits for the last one."""

    threads: ThreadPoolExecutor | None = None
    running: Future | None = None  # of the function that runs; None after `wait`

    def start(self, function: Callable[[], None]):
        """Run a function in the thread; call `wait` before starting another."""
        assert self.running is None
        self.threads = self.threads or ThreadPoolExecutor(1, "checkpoint")
        self.running = self.threads.submit(function)

    def wait(self):
        """Wait until the function has ended; raise its exception, if any."""
        running, self.running = self.running, None
        if running is not None:
            running.result()

    def __exit__(self, _kind, error: BaseException | None, _traceback):
        try:
            self.wait()
        except Exception as own_error:
            if error is None:
                raise
            error.add_note(str(own_error))
