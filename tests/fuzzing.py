"""Settings for tests that generate their examples with hypothesis."""

import os

from hypothesis import HealthCheck, settings


def fuzz(n_examples: int) -> settings:
    """Return settings for `n_examples` examples, the same each time; FUZZ=20 makes them 20 times as many."""
    return settings(
        max_examples=n_examples * int(os.environ.get("FUZZ", "1")), derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
