"""Confidence intervals of means."""

Z = 1.959964  # standard errors on either side of the mean that a normal distribution's central 95 % spans


def mean_interval(mean: float, error: float | None) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean by the normal approximation; None if it has no standard error."""
    return None if error is None else (mean - Z * error, mean + Z * error)
