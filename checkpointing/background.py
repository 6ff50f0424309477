"""Writing a checkpoint beside training."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs one function at a time in a thread; the end of its `with` block waits for the last one."""

    def __init__(self):
        self.last: Future | None = None
        self.threads: ThreadPoolExecutor | None = None

    def start(self, function: Callable[[], None]):
        """Run a function in the thread; the one before must have been waited for."""
        assert self.last is None
        self.threads = self.threads or ThreadPoolExecutor(1, "checkpoint")
        self.last = self.threads.submit(function)

    def wait(self):
        """Wait until nothing runs; raise what the function that was running has raised."""
        last, self.last = self.last, None
        if last is not None:
            last.result()

    def __enter__(self):
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback):
        try:
            self.wait()
        except Exception as own_error:
            if error is None:
                raise
            error.add_note(str(own_error))
