"""The filters of a synthetic set, on masks drawn by hand."""

import pytest
import torch
from torch import Tensor

from dreamcache_core.data.synthetic.quality import (
    QualityLimits,
    is_blank,
    judge_mask,
    largest_component,
    touches_border,
)
from dreamcache_core.errors import InputError

LIMITS = QualityLimits()


def draw(*rows: str) -> Tensor:
    """Draw a mask: # is the subject."""
    return torch.tensor([[[mark == "#" for mark in row] for row in rows]])


def block(top: int, left: int, height: int, width: int, size: tuple[int, int] = (20, 30)) -> Tensor:
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, top : top + height, left : left + width] = True
    return mask


def test_a_subject_in_the_middle_is_kept_as_it_is() -> None:
    mask = block(5, 8, 10, 12)
    verdict = judge_mask(mask, LIMITS)
    assert verdict.reason is None
    assert torch.equal(verdict.mask, mask)


def test_an_empty_mask_is_no_subject() -> None:
    assert judge_mask(block(0, 0, 0, 0), LIMITS).reason == "no subject"


def test_area_limits_are_shares_of_the_image_and_inclusive() -> None:
    limits = QualityLimits(min_area=0.02, max_area=0.5)  # of 600 pixels: 12 and 300
    assert judge_mask(block(5, 5, 3, 4), limits).reason is None
    small = judge_mask(block(5, 5, 1, 11), limits)
    assert (small.reason, small.value) == ("too small", 11 / 600)
    assert judge_mask(block(2, 5, 15, 20), limits).reason is None
    large = judge_mask(block(2, 5, 15, 21), limits)
    assert (large.reason, large.value) == ("too large", 315 / 600)


def test_specks_are_dropped_and_many_of_them_reject_the_sample() -> None:
    main = block(5, 5, 9, 10)  # 90 pixels, and 10 more are still 90 %
    kept = judge_mask(main | block(15, 20, 2, 5), LIMITS)
    assert kept.reason is None
    assert torch.equal(kept.mask, main)
    scattered = judge_mask(main | block(15, 15, 1, 11), LIMITS)
    assert (scattered.reason, scattered.value) == ("scattered", 90 / 101)


@pytest.mark.parametrize(
    "place", [(0, 5, 10, 10), (10, 5, 10, 10), (5, 0, 10, 10), (5, 20, 10, 10)]
)
def test_each_border_rejects_unless_it_is_allowed(place: tuple[int, int, int, int]) -> None:
    assert judge_mask(block(*place), LIMITS).reason == "touches border"
    assert judge_mask(block(*place), QualityLimits(allow_border=True)).reason is None


def test_one_pixel_from_the_border_does_not_touch_it() -> None:
    assert not touches_border(block(1, 1, 18, 28))


def test_only_the_main_part_counts_at_the_border() -> None:
    mask = block(5, 8, 10, 12) | block(0, 0, 1, 2)
    assert judge_mask(mask, LIMITS).reason is None


def test_corners_connect_and_the_largest_part_wins() -> None:
    mask = draw(
        "##....",
        "##..#.",
        "...#..",
        "..#...",
        ".#..#.",
        "#....#",
    )
    expected = draw(
        "......",
        "....#.",
        "...#..",
        "..#...",
        ".#....",
        "#.....",
    )
    assert torch.equal(largest_component(mask), expected)
    assert not largest_component(mask & False).any()


def test_an_image_of_one_colour_is_blank() -> None:
    black, noise = torch.zeros(1, 20, 30, 3), torch.rand(1, 20, 30, 3)
    assert is_blank(black)
    assert is_blank(black + torch.tensor([1.0, 0.5, 0.0]))
    assert not is_blank(noise)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_overflowed_in_one_pixel_is_blank(value: float) -> None:
    image = torch.rand(1, 20, 30, 3)
    image[0, 3, 4, 1] = value
    assert is_blank(image)


@pytest.mark.parametrize(
    "limits",
    [
        {"min_area": 0.5, "max_area": 0.4},
        {"min_area": -0.1},
        {"max_area": 1.1},
        {"min_main_share": 1.5},
        {"min_area": float("nan")},
    ],
)
def test_limits_outside_their_range_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"min_area|min_main_share"):
        QualityLimits(**limits)  # pyright: ignore[reportArgumentType]
