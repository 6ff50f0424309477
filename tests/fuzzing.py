"""How many examples the tests make up that try out whatever may come."""

import os

from hypothesis import HealthCheck, settings


def fuzz(n_examples: int) -> settings:
    """So many examples, the same ones each time; with the variable FUZZ=20, twenty times as many."""
    return settings(
        max_examples=n_examples * int(os.environ.get("FUZZ", "1")), derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
