"""Win rates and means with their standard errors and intervals."""

import math
from collections.abc import Sequence

import numpy as np

from reporting.intervals import Z

# Inverse variances of normal priors on θ and φ. Without priors the fit is infinite if a wins every pair, or exactly the
# pairs where its response is longer. φ's prior is wider, so length explains what both could explain.
_PRECISIONS = np.array([0.1, 0.001])


def wilson_interval(mean: float, n: int) -> list[float]:
    """Return Wilson's 95 % interval for the share `mean` of `n` (https://doi.org/10.1080/01621459.1927.10502953)."""
    center, width = mean + Z**2 / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    low, high = ((center + sign * width) / (1 + Z**2 / n) for sign in (-1, 1))
    return [min(low, mean), max(high, mean)]  # rounding would leave shares of 0 and 1 outside


def mean_and_error(values: Sequence[float], clusters: Sequence[object]) -> tuple[float, float | None]:
    """Return the mean and its standard error; values in the same cluster, such as samples for one prompt, may be alike.

    The error is the cluster-robust one: for N values with residuals e in G clusters,
    sqrt(G / (G - 1) Σ_g (Σ_{i in g} e_i)²) / N. For clusters of one value this is the usual error; for a single cluster
    it is None.
    """
    mean = sum(values) / len(values)
    sums: dict[object, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) == 1:
        return mean, None
    return mean, math.sqrt(len(sums) / (len(sums) - 1) * sum(e**2 for e in sums.values())) / len(values)


def length_controlled(scores: Sequence[float], differences: Sequence[int]) -> tuple[float, list[float]]:
    """Return the win rate as it would be between responses of equal length, and its 95 % interval.

    As in https://arxiv.org/abs/2404.04475, without its term for how hard a prompt is: the logistic regression
    P(a wins) = σ(θ + φ tanh(Δ / s)) at Δ = 0, which is σ(θ). The scale s is the root mean square of Δ; the standard
    deviation would be 0 if all differences were equal.

    Args:
        scores: 1 (a wins), 0 (b wins) or 0.5 (a tie) for each pair.
        differences: Δ, how much longer a's response is than b's (characters).
    """
    y, delta = np.asarray(scores, dtype=float), np.asarray(differences, dtype=float)
    scale = math.sqrt(np.mean(delta**2)) or 1.0
    x = np.stack([np.ones_like(delta), np.tanh(delta / scale)], axis=1)  # (N, 2)

    def objective(beta: np.ndarray) -> float:
        z = x @ beta
        return float(np.sum(y * z - np.logaddexp(0, z)) - _PRECISIONS @ beta**2 / 2)

    def curvature(p: np.ndarray) -> np.ndarray:
        return (x * (p * (1 - p))[:, None]).T @ x + np.diag(_PRECISIONS)  # (2, 2)

    beta = np.zeros(2)
    for _ in range(500):  # Newton's method on a concave objective; a step that would lower it is halved
        p = _sigmoid(x @ beta)
        step = np.linalg.solve(curvature(p), x.T @ (y - p) - _PRECISIONS * beta)
        while objective(beta + step) < objective(beta) and np.abs(step).max() > 1e-9:
            step /= 2
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            break
    error = math.sqrt(np.linalg.inv(curvature(_sigmoid(x @ beta)))[0, 0])
    low, rate, high = _sigmoid(beta[0] + error * np.array([-Z, 0.0, Z]))
    return float(rate), [float(low), float(high)]


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))
