"""Confidence intervals of means."""

Z = 1.959964  # 95 % of a normal distribution lie within Z standard deviations of its mean


def mean_interval(mean: float, error: float | None) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean by the normal approximation; None if it has no standard error."""
    return None if error is None else (mean - Z * error, mean + Z * error)
