"""Means, differences and closed gaps over triples, with bootstrap confidence intervals; knows numbers only.

Every function takes one number per triple, at least two, in the same order; triples are drawn as a whole, so that what
belongs to one stays together. They raise InputError where the numbers differ in length or are not finite, and
MissingPackageError without scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dreamcache_core.errors import InputError
from dreamcache_core.evaluation.statistics import Interval, bootstrap

RESAMPLES = 5_000


def mean_interval(values: Sequence[float]) -> Interval:
    """Average."""
    return _interval([values], np.mean)


def difference_interval(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Average what a condition gains on another."""
    return _interval([values, baseline], _difference)


def gap_interval(
    values: Sequence[float], lower: Sequence[float], upper: Sequence[float]
) -> Interval:
    """Say which share of the gap between two bounds a condition closes: (mean - lower) / (upper - lower).

    Args:
        values: The condition's.
        lower: What wrong images give; the share is 0 there.
        upper: What right images give; the share is 1 there.

    Raises:
        InputError: The bounds do not differ.
    """
    if not np.mean(lower) < np.mean(upper):
        raise InputError(
            f"Expected a lower bound below the upper one, got means {np.mean(lower):.3f} and {np.mean(upper):.3f}. "
            "Measure both bounds on the same triples."
        )
    return _interval([values, lower, upper], _gap)


def _difference(values: np.ndarray, baseline: np.ndarray, axis: int) -> np.ndarray:
    return values.mean(axis=axis) - baseline.mean(axis=axis)


def _gap(values: np.ndarray, lower: np.ndarray, upper: np.ndarray, axis: int) -> np.ndarray:
    floor = lower.mean(axis=axis)
    return (values.mean(axis=axis) - floor) / (upper.mean(axis=axis) - floor)


def _interval(samples: Sequence[Sequence[float]], statistic: Callable[..., np.ndarray]) -> Interval:
    lengths = [len(sample) for sample in samples]
    if len(set(lengths)) > 1 or min(lengths) < 2:
        raise InputError(
            f"Expected as many values of each kind, at least two, got {lengths}. "
            "Measure every condition on the same triples."
        )
    if not all(np.isfinite(sample).all() for sample in samples):
        raise InputError("Expected finite values, got NaN or infinity. Leave out what failed.")
    return bootstrap(samples, statistic, RESAMPLES)
