"""What makes a generated image and its subject's mask fit for training; knows no files and no models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...config import check_range
from ...errors import InputError
from ...packages import require

Reason = Literal["no subject", "scattered", "too small", "too large", "touches border"]

BLANK_RANGE = 2 / 255
"""An image whose channels each span no more than this shows nothing: what a safety checker or an overflow leaves."""


@dataclass(frozen=True)
class QualityLimits:
    """What a mask must keep to.

    Attributes:
        min_area: Least share of the image that the subject takes, in [0, 1].
        max_area: Greatest share of the image, in [0, 1].
        min_main_share: Least share of the mask that its largest connected part holds, in [0, 1].
        allow_border: Whether the subject may touch the image's border, where it may be cut off.
    """

    min_area: float = 0.02
    max_area: float = 0.8
    min_main_share: float = 0.9
    allow_border: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            InputError: A share is outside [0, 1], or no area is allowed.
        """
        if not 0 <= self.min_area <= self.max_area <= 1:
            raise InputError(
                f"Expected 0 <= min_area <= max_area <= 1, got {self.min_area} and {self.max_area}. They are shares "
                "of the image's area."
            )
        check_range("min_main_share", self.min_main_share, 0, 1)


@dataclass(frozen=True, eq=False)
class Verdict:
    """Whether a mask is fit.

    Attributes:
        mask: The largest connected part of the mask, (1, height, width), bool; the few pixels beside it are dropped.
        reason: Why the sample is rejected; ``None``: it is kept.
        value: The measured share that led to the rejection, where there is one.
    """

    mask: Tensor
    reason: Reason | None = None
    value: float | None = None


def is_blank(image: Tensor) -> bool:
    """Tell whether an image shows nothing in which a subject can be looked for.

    Args:
        image: (1, height, width, 3), float, in [0, 1]; NaN and infinity where its making overflowed.
    """
    low, high = image.amin(dim=(0, 1, 2)), image.amax(dim=(0, 1, 2))  # -> (3,)
    return not bool(image.isfinite().all()) or float((high - low).max()) <= BLANK_RANGE


def judge_mask(mask: Tensor, limits: QualityLimits) -> Verdict:
    """Tell whether a mask is fit for training.

    Args:
        mask: Where the subject is, (1, height, width), bool.
        limits: What it must keep to; a measure equal to a limit is within it.

    Returns:
        The verdict. Area and border are those of the largest connected part.

    Raises:
        MissingPackageError: SciPy is not installed.
    """
    if not bool(mask.any()):
        return Verdict(mask, "no subject")
    main = largest_component(mask)
    share = int(main.sum()) / int(mask.sum())
    area = int(main.sum()) / main.numel()
    if share < limits.min_main_share:
        return Verdict(main, "scattered", share)
    if area < limits.min_area:
        return Verdict(main, "too small", area)
    if area > limits.max_area:
        return Verdict(main, "too large", area)
    if touches_border(main) and not limits.allow_border:
        return Verdict(main, "touches border")
    return Verdict(main)


def largest_component(mask: Tensor) -> Tensor:
    """Keep the largest connected part of a mask, (1, height, width) bool; the first in reading order among equals.

    Pixels that meet at a corner are connected.

    Raises:
        MissingPackageError: SciPy is not installed.
    """
    with require("scipy", "train"):
        import numpy as np
        from scipy import ndimage
    labels: Any = ndimage.label(mask[0].cpu().numpy(), structure=np.ones((3, 3)))
    parts = torch.from_numpy(labels[0].astype("int64"))
    sizes = parts.flatten().bincount()
    sizes[0] = 0  # the background
    largest = int(sizes.argmax())
    return ((parts == largest) & (parts > 0))[None].to(mask.device)


def touches_border(mask: Tensor) -> bool:
    """Tell whether a mask (1, height, width), bool, holds a pixel of the outermost rows or columns."""
    inside = mask[:, 1:-1, 1:-1]
    return int(inside.sum()) < int(mask.sum())
