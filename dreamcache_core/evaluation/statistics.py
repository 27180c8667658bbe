"""Bootstrap confidence intervals; knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..packages import require

CONFIDENCE = 0.95
RESAMPLES = 9_999


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds the true value with 95 % confidence.

    Attributes:
        value: The estimate.
        low: Lower end; NaN where one value alone tells nothing of it.
        high: Upper end, likewise.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        """Write it as ``0.767 [0.741, 0.790]``."""
        ends = "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{ends}"


def bootstrap(
    samples: Sequence[Sequence[float]],
    statistic: Callable[..., Any],
    resamples: int = RESAMPLES,
) -> Interval:
    """Estimate a statistic, with the percentile bootstrap interval.

    Args:
        samples: One or more samples of at least two values, all of the same length: what belongs together is drawn
            together.
        statistic: Takes the samples as arrays and the ``axis`` to reduce.
        resamples: How often values are drawn, always from the same seed.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    with require("scipy", "eval"):
        import scipy.stats
    data = [np.asarray(sample, dtype=np.float64) for sample in samples]
    found: Any = scipy.stats.bootstrap(
        data,
        statistic,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return Interval(float(statistic(*data, axis=-1)), float(low), float(high))
