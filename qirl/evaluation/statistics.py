"""Means with standard errors and 95 % intervals where the values come in clusters (images of one prompt)."""

from __future__ import annotations

import numpy as np
from scipy.stats import t as student


def mean_and_error(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Mean of values [n] and its standard error: values of one cluster are not independent of each other.

    clusters [n] names each value's cluster. The error is NaN with fewer than two clusters.
    """
    n, names = len(values), np.unique(clusters)
    if len(names) < 2:
        return float(values.mean()), float("nan")
    sums = np.array([(values[clusters == c] - values.mean()).sum() for c in names])
    return float(values.mean()), float(np.sqrt(len(names) / (len(names) - 1) * (sums**2).sum()) / n)


def interval(values: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """{"value", "low", "high"}: the mean and its 95 % interval, by Student's t with clusters - 1 degrees of freedom.

    Values that are all alike have an interval of no width. NaN with fewer than two clusters.
    """
    value, error = mean_and_error(values, clusters)
    freedom = len(np.unique(clusters)) - 1
    reach = float(student.ppf(0.975, freedom)) * error if freedom > 0 else float("nan")
    return {"value": value, "low": value - reach, "high": value + reach}
