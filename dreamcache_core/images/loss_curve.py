"""The course of a training run as an image, drawn with Pillow; knows numbers only."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import InputError
from .tensors import image_to_tensor

MARGIN_PX = (64, 28, 16, 28)
"""Room for labels left, top, right and below."""

GREY, LIGHT, PALE, BLUE = (90, 90, 90), (230, 230, 230), (190, 208, 236), (31, 90, 180)
NUM_LINES = 4


def draw_loss_curve(losses: Sequence[float], *, width: int = 640, height: int = 360) -> Tensor:
    """Draw the loss of each step, pale, and its moving average, dark.

    Args:
        losses: Loss of each step, finite, at least one.
        width: Width of the image, pixels.
        height: Height of the image, pixels.

    Returns:
        The image, (1, height, width, 3), float32 in [0, 1].

    Raises:
        InputError: There is no loss, or one is not finite.
    """
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise InputError("Expected at least one finite loss to draw, got none or NaN. Train first.")
    smooth, count = moving_average(losses), len(losses)
    low, high = min(losses), max(losses)
    if low == high:
        low, high = low - 0.5, high + 0.5
    left, top, right, bottom = MARGIN_PX
    across, down = width - left - right, height - top - bottom

    def place(step: int, value: float) -> tuple[float, float]:
        share = step / max(1, count - 1)
        return left + across * share, top + down * (high - value) / (high - low)

    image, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default()
    draw = ImageDraw.Draw(image)
    for number in range(NUM_LINES + 1):
        value = low + (high - low) * number / NUM_LINES
        _, y = place(0, value)
        draw.line([(left, y), (width - right, y)], fill=LIGHT)
        draw.text((8, y - 6), f"{value:.3g}", fill=GREY, font=font)
    draw.text((left, height - 20), "step 1", fill=GREY, font=font)
    last = str(count)
    draw.text((width - right - draw.textlength(last, font), height - 20), last, GREY, font)
    draw.text((left, 8), f"loss {smooth[-1]:.4g} after step {count}", fill=BLUE, font=font)
    for values, colour, line_px in ((losses, PALE, 1), (smooth, BLUE, 2)):
        points = [place(step, value) for step, value in enumerate(values)]
        # one point is no line
        draw.line([*points, (points[-1][0] + 1, points[-1][1])], fill=colour, width=line_px)
    return image_to_tensor(image)


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
