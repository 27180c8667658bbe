"""References as training sees them: the subject cut out, at random size and place on white, sometimes altered."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from ..errors import InputError
from ..images.reference import check_image, check_placement, cut_out_subject, subject_opacity
from ..images.tensors import image_to_tensor, tensor_to_image

FILL = (0.7, 1.0)
"""Share of the square's side that the subject's longer side takes."""

FLIP_PROBABILITY = 0.5

JITTER_PROBABILITY = 0.1
JITTER = 0.2
"""Largest change of brightness, contrast and saturation, as a share."""
HUE_JITTER = 0.05
"""Largest shift of hue, in turns."""

ERASE_PROBABILITY = 0.4
ERASED_AREA = (0.02, 0.25)
"""Share of the square."""
ERASED_ASPECT = (0.3, 3.3)
"""Height over width."""


@dataclass(frozen=True)
class Alterations:
    """What may happen to a reference besides its size and place; everything is DreamCache's recipe.

    Attributes:
        flip: Left and right are exchanged; not for subjects that must not be mirrored, lettering say.
        jitter: Colours are altered a little; not where the subject's own colours must come back.
        erase: A rectangle is painted white.
    """

    flip: bool = True
    jitter: bool = True
    erase: bool = True


ALL_ALTERATIONS = Alterations()
NO_ALTERATIONS = Alterations(flip=False, jitter=False, erase=False)


def augment_reference(
    image: Tensor,
    mask: Tensor | None,
    *,
    size: int,
    generator: torch.Generator,
    alterations: Alterations = ALL_ALTERATIONS,
) -> Tensor:
    """Make a training reference from an image of the subject.

    Source: DreamCache, training references. Differs from it in: colours are altered on the subject alone, so that
    the white around it stays white.

    Args:
        image: The image, (1, height, width, 3 or 4), float, in [0, 1]; a 4th channel is alpha.
        mask: Where the subject is, (1, height, width) in [0, 1], any size of the same aspect; ``None``: everywhere,
            or where alpha says.
        size: Side of the square, pixels; a multiple of 8 in 64 ... 2048.
        generator: Source of all randomness, on the CPU; the same state gives the same reference.
        alterations: Which may happen. Leaving one out leaves size, place and the others as they were.

    Returns:
        (1, ``size``, ``size``, 3), float32 in [0, 1], on the device of ``image``.

    Raises:
        InputError: The mask is empty or misfit, or an argument is out of range.
    """
    long_side = check_placement(size, _uniform(*FILL, generator))
    check_image(image)
    if len(image) != 1:
        raise InputError(f"Expected one image, got a batch of {len(image)}. Give one at a time.")
    opacity = subject_opacity(image, mask)
    colour, subject = cut_out_subject(image[0], None if opacity is None else opacity[0], long_side)
    if _happens(FLIP_PROBABILITY, generator) and alterations.flip:
        colour, subject = colour.flip(1), subject.flip(1)
    if _happens(JITTER_PROBABILITY, generator):
        # drawn in any case, so that what follows is drawn the same
        altered = _jitter(colour, subject, generator)
        colour = altered if alterations.jitter else colour
    height, width = subject.shape
    top, left = (_integer(size - side, generator) for side in (height, width))
    reference = image.new_ones((1, size, size, 3), dtype=torch.float32)
    reference[0, top : top + height, left : left + width] = colour + 1 - subject[..., None]
    if _happens(ERASE_PROBABILITY, generator) and alterations.erase:
        _erase(reference, generator)
    return reference.clamp_(0, 1)


def _jitter(colour: Tensor, opacity: Tensor, generator: torch.Generator) -> Tensor:
    """Alter brightness, contrast, saturation and hue, in random order; premultiplied colours in and out."""
    alpha = opacity[..., None]
    # the mean of the subject where there is none of it, or else contrast would turn about another grey
    mean = colour.mean(dim=(0, 1)) / alpha.mean()
    straight = torch.where(alpha > 0, colour / alpha.clamp_min(1e-6), mean).clamp(0, 1)
    image = tensor_to_image(straight.expand(-1, -1, 3)[None])
    for change in torch.randperm(4, generator=generator).tolist():
        image = _change(image, change, generator)
    return image_to_tensor(image)[0].to(colour.device) * alpha


def _change(image: Image.Image, change: int, generator: torch.Generator) -> Image.Image:
    if change == 3:
        return _shift_hue(image, _uniform(-HUE_JITTER, HUE_JITTER, generator))
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    return kinds[change](image).enhance(_uniform(1 - JITTER, 1 + JITTER, generator))


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = round(turns * 256)
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _erase(reference: Tensor, generator: torch.Generator) -> None:
    """Paint a rectangle white; no shape in the ranges above is larger than the square."""
    size = reference.shape[1]
    area = _uniform(*ERASED_AREA, generator) * size**2
    low, high = map(math.log, ERASED_ASPECT)
    aspect = math.exp(_uniform(low, high, generator))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    top, left = (_integer(size - side, generator) for side in (height, width))
    reference[:, top : top + height, left : left + width] = 1


def _happens(probability: float, generator: torch.Generator) -> bool:
    return _uniform(0, 1, generator) < probability


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(highest: int, generator: torch.Generator) -> int:
    """Draw from 0 ... highest."""
    return int(torch.randint(highest + 1, (), generator=generator))
