"""Estimate the remaining time of a training run."""

import collections
import time
from collections.abc import Callable

_RECENT = 100  # steps, whose speed the remaining ones are expected to have
_RECENT_PAUSES = 3  # evaluations and saves


class TimeLeft:
    """Estimates the time to the end: remaining steps at their recent speed, evaluations and saves at theirs.

    There is one clock, read at the end of each step, evaluation and save. So each second counts once, and waiting for
    data is included.
    """

    def __init__(
        self,
        n_examples: int,
        batch_size: int = 1,
        eval_every: int | None = None,
        save_every: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            n_examples: number of training examples at the end of the run.
            eval_every, save_every: in examples; None: only at the end.
        """
        self.n_examples, self.batch_size = n_examples, batch_size
        self.every = {"evaluation": eval_every, "save": save_every}
        self.clock, self.last = clock, clock()
        self.seconds_of = {"step": collections.deque(maxlen=_RECENT)}
        self.seconds_of |= {kind: collections.deque(maxlen=_RECENT_PAUSES) for kind in self.every}

    def tick(self, kind: str):
        """Count the time since the last call as that of one step, evaluation or save."""
        now = self.clock()
        self.seconds_of[kind].append(now - self.last)
        self.last = now

    def seconds(self, examples: int) -> float:
        """Return the seconds to the end of the run after this many examples."""
        n_steps = -(-(self.n_examples - examples) // self.batch_size)
        pauses = sum(self._n_to_come(kind, examples) * self._mean(kind) for kind in self.every)
        return n_steps * self._mean("step") + pauses

    def _n_to_come(self, kind: str, examples: int) -> int:
        """Return the number of evaluations or saves to come: those that are due, and one at the end."""
        every = self.every[kind] or self.n_examples
        next_one = -(-max(examples, 1) // every) * every  # at `examples` itself it comes after the line that asks
        return max(0, -(-(self.n_examples - next_one) // every)) + 1

    def _mean(self, kind: str) -> float:
        """Return the mean of the last ones' seconds, 0 if none has been measured yet."""
        seconds = self.seconds_of[kind]
        return sum(seconds) / len(seconds) if seconds else 0.0
