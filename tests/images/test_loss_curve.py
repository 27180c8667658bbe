"""The image of a training run."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamcache_core.errors import InputError
from dreamcache_core.images.loss_curve import BLUE, MARGIN_PX, PALE, draw_loss_curve, moving_average

LEFT, TOP, RIGHT, BOTTOM = MARGIN_PX


def places_of(colour: tuple[int, int, int], image: Tensor) -> Tensor:
    """Rows and columns of the plot's pixels in one colour; labels lie outside the plot."""
    plot = (image[0] * 255).round()[TOP:]
    return (plot == torch.tensor(colour)).all(dim=-1).nonzero() + torch.tensor([TOP, 0])


def test_the_curve_is_an_image_of_the_wanted_size() -> None:
    image = draw_loss_curve([1.0, 0.5, 0.25], width=320, height=200)
    assert image.shape == (1, 200, 320, 3)
    assert image.dtype == torch.float32
    assert (image.min() >= 0, image.max()) == (True, 1)


def test_a_falling_loss_goes_from_the_top_left_to_the_bottom_right() -> None:
    rows, columns = places_of(BLUE, draw_loss_curve([3.0, 2.0, 1.0], width=320, height=200)).T
    assert abs(int(rows[columns.argmin()]) - TOP) <= 2
    assert abs(int(rows[columns.argmax()]) - (200 - BOTTOM)) <= 2
    assert int(columns.min()) >= LEFT - 2
    assert int(columns.max()) <= 320 - RIGHT + 2


def test_the_smooth_curve_lies_within_the_noisy_one() -> None:
    losses = [1.0 + (-1) ** step for step in range(100)]
    image = draw_loss_curve(losses)
    pale, blue = places_of(PALE, image)[:, 0], places_of(BLUE, image)[:, 0]
    assert (int(pale.min()), int(pale.max())) == (TOP, 360 - BOTTOM)
    late = places_of(BLUE, image)
    late = late[late[:, 1] > 200][:, 0]
    middle = (TOP + 360 - BOTTOM) / 2
    assert int((late - middle).abs().max()) <= 3
    assert blue.numel()


def test_a_single_loss_and_a_constant_one_are_drawn_in_the_middle() -> None:
    for losses in ([0.7], [0.7] * 5):
        rows = places_of(BLUE, draw_loss_curve(losses, width=320, height=200))[:, 0]
        assert abs(float(rows.float().mean()) - (TOP + 200 - BOTTOM) / 2) <= 1


def test_the_average_is_taken_over_a_tenth_of_the_steps() -> None:
    assert moving_average([4.0, 2.0]) == [4.0, 2.0]
    values = [float(step) for step in range(20)]
    assert moving_average(values) == [0.0, *(step - 0.5 for step in range(1, 20))]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_loss_curve([]),
        lambda: draw_loss_curve([1.0, math.nan]),
        lambda: draw_loss_curve([1.0, math.inf]),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Callable[[], Tensor]) -> None:
    with pytest.raises(InputError, match="at least one finite loss"):
        draw()
