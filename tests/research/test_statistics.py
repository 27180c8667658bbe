"""Bootstrap intervals of the demo's evidence."""

import math

import numpy as np
import pytest

from dreamcache_core.errors import InputError
from dreamcache_core.evaluation.statistics import Interval
from research.evidence.statistics import difference_interval, gap_interval, mean_interval


def test_the_interval_of_a_mean_is_near_the_closed_form() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = mean_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_equal_values_leave_no_doubt() -> None:
    assert mean_interval([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)


def test_pairs_stay_together() -> None:
    baseline = np.random.default_rng(1).normal(0.0, 100.0, 50)
    found = difference_interval((baseline + 3.0).tolist(), baseline.tolist())
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_the_difference_is_what_the_first_has_more() -> None:
    assert difference_interval([1.0, 2.0], [0.0, 0.0]).value == 1.5


def test_the_gap_is_closed_by_the_share_of_the_way_from_lower_to_upper() -> None:
    lower, upper = [0.1, 0.3, 0.2], [0.9, 1.0, 0.8]
    assert gap_interval([0.5, 0.6, 0.55], lower, upper).value == pytest.approx(0.35 / 0.7)
    assert gap_interval(lower, lower, upper) == Interval(0.0, 0.0, 0.0)
    assert gap_interval(upper, lower, upper) == Interval(1.0, 1.0, 1.0)


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(2).random(30).tolist()
    assert mean_interval(values) == mean_interval(values)


def test_an_interval_reads_as_text() -> None:
    assert str(Interval(0.7512, 0.7, 0.8)) == "0.751 [0.700, 0.800]"


def test_values_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InputError, match="as many values"):
        difference_interval([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="at least two"):
        mean_interval([1.0])
    with pytest.raises(InputError, match="finite"):
        mean_interval([1.0, math.nan])


def test_bounds_that_do_not_differ_are_refused() -> None:
    with pytest.raises(InputError, match="lower bound below"):
        gap_interval([0.5, 0.5], [0.9, 0.9], [0.1, 0.1])
