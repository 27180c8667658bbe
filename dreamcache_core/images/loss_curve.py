"""The course of a training run as an image, drawn with Pillow; knows numbers only."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import InputError

MARGIN_PX = (64, 28, 16, 28)
"""Room for labels left, top, right and below."""

GREY, PALE, BLUE = (90, 90, 90), (190, 208, 236), (31, 90, 180)
NUM_LINES = 4


def draw_loss_curve(losses: Sequence[float], *, width: int = 640, height: int = 360) -> Tensor:
    """Draw the loss of each step, pale, and its moving average, dark.

    Args:
        losses: Loss of each step, finite, at least one.
        width: Width of the image, pixels, at least 160.
        height: Height of the image, pixels, at least 120.

    Returns:
        The image, (1, height, width, 3), float32 in [0, 1].

    Raises:
        InputError: There is no loss, one is not finite, or the image is too small.
    """
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise InputError("Expected at least one finite loss to draw, got none or NaN. Train first.")
    if width < 160 or height < 120:
        raise InputError(f"Expected 160 x 120 pixels or more, got {width} x {height}.")
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    smooth = moving_average(losses)
    _draw_axes(draw, font, image.size, losses)
    title = f"loss {smooth[-1]:.4g} after step {len(losses)}"
    draw.text((MARGIN_PX[0], 8), title, fill=BLUE, font=font)
    for values, colour, line_px in ((losses, PALE, 1), (smooth, BLUE, 2)):
        points = _points(values, losses, image.size)
        # one point is no line
        draw.line([*points, (points[-1][0] + 1, points[-1][1])], fill=colour, width=line_px)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, height, width, 3).float() / 255


def moving_average(values: Sequence[float]) -> list[float]:
    """Average each value with those before it, in a window of a tenth of what there is.

    Args:
        values: Numbers in order.

    Returns:
        As many averages.
    """
    window = max(1, len(values) // 10)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


def _draw_axes(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    size: tuple[int, int],
    losses: Sequence[float],
) -> None:
    left, _, right, _ = MARGIN_PX
    width, height = size
    low, high = _range(losses)
    for number in range(NUM_LINES + 1):
        value = low + (high - low) * number / NUM_LINES
        ((_, y),) = _points([value], losses, size)
        draw.line([(left, y), (width - right, y)], fill=(230, 230, 230))
        draw.text((8, y - 6), f"{value:.3g}", fill=GREY, font=font)
    draw.text((left, height - 20), "step 1", fill=GREY, font=font)
    last = str(len(losses))
    draw.text((width - right - draw.textlength(last, font), height - 20), last, GREY, font)


def _range(losses: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value of the vertical axis; never equal."""
    low, high = min(losses), max(losses)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _points(
    values: Sequence[float], losses: Sequence[float], size: tuple[int, int]
) -> list[tuple[float, float]]:
    """Place values, the first at the left end and the last at the right, in pixels."""
    left, top, right, bottom = MARGIN_PX
    low, high = _range(losses)
    across, down = size[0] - left - right, size[1] - top - bottom
    steps = max(1, len(values) - 1)
    return [
        (left + across * i / steps, top + down * (high - value) / (high - low))
        for i, value in enumerate(values)
    ]
