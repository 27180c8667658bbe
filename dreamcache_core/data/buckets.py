"""Sizes of targets: one square, or the aspect bucket nearest to each image; and cropping to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..config import check_range
from ..errors import DreamCacheError, InputError
from ..images.reference import resize_smoothly
from ..method.cache import LATENT_FACTOR
from .sources.source import PairSource

STEP = 64
"""Every side of a bucket is a multiple of this many pixels."""

MAX_ASPECT = 2.0
"""Longer side of a bucket over its shorter side, at most."""


def aspect_buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """List sizes of about the area of a square, from upright to wide.

    Args:
        resolution: Side of the square, pixels; at least ``STEP``.

    Returns:
        Heights and widths, multiples of ``STEP``, tallest first; with each its transpose.

    Raises:
        InputError: ``resolution`` is too small.
    """
    check_range("resolution", resolution, STEP)
    sizes: set[tuple[int, int]] = set()
    for units in range(1, math.ceil(MAX_ASPECT * resolution / STEP) + 1):
        one, other = units * STEP, round(resolution**2 / (units * STEP) / STEP) * STEP
        if max(one, other) <= MAX_ASPECT * min(one, other):
            sizes |= {(one, other), (other, one)}
    return tuple(sorted(sizes, key=lambda size: (-size[0], size[1])))


def bucket_choice(resolution: int, has_buckets: bool) -> tuple[tuple[int, int], ...]:
    """List the sizes that targets may take: aspect buckets, or the square alone."""
    return aspect_buckets(resolution) if has_buckets else ((resolution, resolution),)


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Find the bucket (height, width) whose aspect is nearest, as a ratio of ratios; the first among equals."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))


def target_sizes(
    source: PairSource, resolution: int, *, has_buckets: bool
) -> list[tuple[int, int]]:
    """Choose height and width, pixels, of every target of a set; with buckets, the header of every image is read.

    A target that cannot be read is given the square: what reads it deals with it.

    Raises:
        InputError: ``resolution`` is no multiple of 8.
    """
    if resolution < LATENT_FACTOR or resolution % LATENT_FACTOR:
        raise InputError(
            f"Expected a resolution that is a multiple of {LATENT_FACTOR}, got {resolution}. Use 512 for Stable "
            "Diffusion 1 and 2, 1024 for SDXL."
        )
    if not has_buckets:
        return [(resolution, resolution)] * len(source.keys)
    buckets = aspect_buckets(resolution)

    def size_of(index: int) -> tuple[int, int]:
        try:
            return nearest_bucket(*source.size(index), buckets)
        except DreamCacheError:
            return resolution, resolution

    return [size_of(index) for index in range(len(source.keys))]


def crop_target(image: Tensor, height: int, width: int) -> Tensor:
    """Resize images until they just cover a size, without aliasing, and cut out their centre.

    What is far outside is cut off before: scaled up, a thin image may take more room than there is.

    Args:
        image: (batch, height, width, channels), float, in [0, 1].
        height: New height, pixels.
        width: New width, pixels.
    """
    image = _near_centre(image, height / width)
    old_height, old_width = image.shape[1:3]
    factor = max(height / old_height, width / old_width)
    covered = max(height, round(old_height * factor)), max(width, round(old_width * factor))
    # -> (batch, channels, height, width) and back
    resized = resize_smoothly(image.permute(0, 3, 1, 2), *covered).permute(0, 2, 3, 1)
    top, left = (covered[0] - height) // 2, (covered[1] - width) // 2
    return resized[:, top : top + height, left : left + width].clamp(0, 1).contiguous()


def _near_centre(image: Tensor, aspect: float) -> Tensor:
    """Cut off what lies farther from the centre than the longer side of a crop of this height over width."""
    sides = image.shape[1:3]
    most = (math.ceil(2 * sides[1] * aspect), math.ceil(2 * sides[0] / aspect))
    # as much on both sides, so that the centre stays where it is
    cuts = [max(0, (side - limit) // 2) for side, limit in zip(sides, most, strict=True)]
    return image[:, cuts[0] : sides[0] - cuts[0], cuts[1] : sides[1] - cuts[1]]
