"""Sizes of targets: one square, or the aspect bucket nearest to each image; and cropping to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..errors import InputError
from ..images.reference import resize_smoothly
from ..pipeline.latents import LATENT_FACTOR
from .sources.source import PairSource

MAX_ASPECT = 2.0
"""Longer side of a bucket over its shorter side, at most."""


def aspect_buckets(resolution: int, step: int = 64) -> tuple[tuple[int, int], ...]:
    """List sizes of about the area of a square, from upright to wide.

    Args:
        resolution: Side of the square, pixels; at least ``step``.
        step: Every side is a multiple of this many pixels; a multiple of 8.

    Returns:
        Heights and widths, tallest first; with each its transpose.

    Raises:
        InputError: ``step`` is no multiple of 8, or ``resolution`` is below it.
    """
    if step < 1 or step % LATENT_FACTOR or resolution < step:
        raise InputError(
            f"Expected a step that is a multiple of {LATENT_FACTOR} and a resolution of at least the step, got "
            f"{step} and {resolution}. Use 64 and 512 for Stable Diffusion 1 and 2."
        )
    sizes: set[tuple[int, int]] = set()
    for units in range(1, math.ceil(MAX_ASPECT * resolution / step) + 1):
        one, other = units * step, round(resolution**2 / (units * step) / step) * step
        if max(one, other) <= MAX_ASPECT * min(one, other):
            sizes |= {(one, other), (other, one)}
    return tuple(sorted(sizes, key=lambda size: (-size[0], size[1])))


def bucket_choice(resolution: int, has_buckets: bool) -> tuple[tuple[int, int], ...]:
    """List the sizes that targets may take: aspect buckets, or the square alone."""
    return aspect_buckets(resolution) if has_buckets else ((resolution, resolution),)


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Find the bucket whose aspect is nearest, as a ratio of ratios; the first among equals.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        buckets: Heights and widths to choose from.

    Returns:
        Height and width of the bucket.
    """
    aspect = math.log(width / height)
    return min(buckets, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))


def target_sizes(
    source: PairSource, resolution: int, *, has_buckets: bool
) -> list[tuple[int, int]]:
    """Choose the size of every target of a set.

    Args:
        source: The set; with buckets, the header of every image is read.
        resolution: Side of the square, pixels, a multiple of 8.
        has_buckets: Whether targets keep their aspect, as far as the buckets have it.

    Returns:
        Height and width, pixels, by index.

    Raises:
        InputError: ``resolution`` is unfit, or an image is too large.
        FileFormatError: An image cannot be read.
    """
    if resolution < LATENT_FACTOR or resolution % LATENT_FACTOR:
        raise InputError(
            f"Expected a resolution that is a multiple of {LATENT_FACTOR}, got {resolution}. Use 512 for Stable "
            "Diffusion 1 and 2, 1024 for SDXL."
        )
    if not has_buckets:
        return [(resolution, resolution)] * len(source.keys)
    buckets = aspect_buckets(resolution)
    return [nearest_bucket(*source.size(i), buckets) for i in range(len(source.keys))]


def crop_target(image: Tensor, height: int, width: int) -> Tensor:
    """Resize an image until it just covers a size, without aliasing, and cut out its centre.

    Args:
        image: (batch, height, width, channels), float, in [0, 1].
        height: New height, pixels.
        width: New width, pixels.

    Returns:
        (batch, ``height``, ``width``, channels), in [0, 1].
    """
    old_height, old_width = image.shape[1:3]
    factor = max(height / old_height, width / old_width)
    covered = max(height, round(old_height * factor)), max(width, round(old_width * factor))
    # -> (batch, channels, height, width) and back
    resized = resize_smoothly(image.permute(0, 3, 1, 2), *covered).permute(0, 2, 3, 1)
    top, left = (covered[0] - height) // 2, (covered[1] - width) // 2
    return resized[:, top : top + height, left : left + width].clamp(0, 1).contiguous()
