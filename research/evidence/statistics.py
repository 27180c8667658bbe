"""Means, differences and closed gaps with bootstrap confidence intervals; knows numbers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dreamcache_core.errors import InputError
from dreamcache_core.packages import require

RESAMPLES = 5_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds the true value with 95 % confidence.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Average one number per triple.

    Args:
        values: At least two, finite.
        seed: Of the resampling.

    Raises:
        InputError: There are fewer than two values, or one is not finite.
        MissingPackageError: scipy is not installed.
    """
    return _bootstrap([values], _mean, seed)


def difference_interval(
    values: Sequence[float], baseline: Sequence[float], seed: int = 0
) -> Interval:
    """Average what a condition gains on another over the same triples.

    Args:
        values: One number per triple, at least two, finite.
        baseline: The other condition's, in the same order.
        seed: Of the resampling; triples are drawn, so that pairs stay together.

    Raises:
        InputError: The lengths differ, there are fewer than two values, or one is not finite.
        MissingPackageError: scipy is not installed.
    """
    return _bootstrap([values, baseline], _difference, seed)


def gap_interval(
    values: Sequence[float], lower: Sequence[float], upper: Sequence[float], seed: int = 0
) -> Interval:
    """Say which share of the gap between two bounds a condition closes: (mean - lower) / (upper - lower).

    Args:
        values: One number per triple, at least two, finite.
        lower: What wrong images give on the same triples, in the same order.
        upper: What right images give.
        seed: Of the resampling; triples are drawn, so that all three stay together.

    Returns:
        The share: 0 at the lower bound, 1 at the upper.

    Raises:
        InputError: The lengths differ, there are fewer than two values, one is not finite, or the bounds do not differ.
        MissingPackageError: scipy is not installed.
    """
    if not np.mean(lower) < np.mean(upper):
        raise InputError(
            f"Expected a lower bound below the upper one, got means {np.mean(lower):.3f} and {np.mean(upper):.3f}. "
            "Measure both bounds on the same triples."
        )
    return _bootstrap([values, lower, upper], _gap, seed)


def _mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return values.mean(axis=axis)


def _difference(values: np.ndarray, baseline: np.ndarray, axis: int = -1) -> np.ndarray:
    return values.mean(axis=axis) - baseline.mean(axis=axis)


def _gap(values: np.ndarray, lower: np.ndarray, upper: np.ndarray, axis: int = -1) -> np.ndarray:
    floor = lower.mean(axis=axis)
    return (values.mean(axis=axis) - floor) / (upper.mean(axis=axis) - floor)


def _bootstrap(
    samples: Sequence[Sequence[float]], statistic: Callable[..., np.ndarray], seed: int
) -> Interval:
    with require("scipy", "eval"):
        from scipy.stats import bootstrap
    data = _checked(samples)
    result: Any = bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(float(statistic(*data)), float(low), float(high))


def _checked(samples: Sequence[Sequence[float]]) -> list[np.ndarray]:
    lengths = {len(sample) for sample in samples}
    if len(lengths) > 1 or min(lengths) < 2:
        raise InputError(
            f"Expected as many values of each kind, at least two, got {[len(sample) for sample in samples]}. "
            "Measure every condition on the same triples."
        )
    data = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not all(np.isfinite(sample).all() for sample in data):
        raise InputError("Expected finite values, got NaN or infinity. Leave out what failed.")
    return data
