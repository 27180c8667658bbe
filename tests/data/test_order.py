"""The order of a run is a function of its seed alone."""

from collections import Counter

import pytest

from dreamcache_core.data.order import SampleOrder, sample_seed


def drawn(order: SampleOrder, first: int, last: int) -> list[int]:
    return [order(position)[1] for position in range(first, last)]


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own() -> None:
    order = SampleOrder(7, seed=3)
    first, second = drawn(order, 0, 7), drawn(order, 7, 14)
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert [order(position)[0] for position in (0, 6, 7, 13, 14)] == [0, 0, 1, 1, 2]


def test_order_does_not_depend_on_where_reading_starts_or_goes() -> None:
    order = SampleOrder(7, seed=3)
    assert drawn(SampleOrder(7, seed=3), 9, 12) == drawn(order, 0, 12)[9:]
    assert order(2) == SampleOrder(7, seed=3)(2)
    assert drawn(SampleOrder(7, seed=4), 0, 7) != drawn(SampleOrder(7, seed=3), 0, 7)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_groups_hold_one_bucket_each_and_every_sample_is_seen(group: int) -> None:
    buckets = [0, 1, 0, 0, 2, 1, 0, 0]
    order = SampleOrder(len(buckets), seed=1, buckets=buckets, group=group)
    for epoch in range(3):
        start = epoch * order.epoch_length
        indices = drawn(order, start, start + order.epoch_length)
        assert set(indices) == set(range(len(buckets)))
        for at in range(0, len(indices), group):
            assert len({buckets[index] for index in indices[at : at + group]}) == 1


def test_a_bucket_repeats_no_more_than_its_last_group_needs() -> None:
    order = SampleOrder(5, seed=0, buckets=[0, 0, 0, 0, 1], group=3)
    counts = Counter(drawn(order, 0, order.epoch_length))
    assert order.epoch_length == 9
    assert counts[4] == 3
    assert sum(counts[index] for index in range(4)) == 6


def test_one_bucket_is_the_order_without_buckets() -> None:
    with_buckets = SampleOrder(6, seed=0, buckets=[0] * 6, group=3)
    assert sorted(drawn(with_buckets, 0, 6)) == list(range(6))


def test_sample_seeds_differ_by_position_and_run_and_fit_a_generator() -> None:
    seeds = {sample_seed(run, position) for run in range(3) for position in range(50)}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)
