"""Finds a subject of the demo world in an image by its shape; knows neither its colours nor where it was meant to be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import ImageFilter

from ...errors import InputError
from ..world.backgrounds import BACKGROUNDS, paint_background
from ..world.world import IMAGE_SIZE, OUTLINE, Pose, Subject, subject_masks

GRID = 64
"""Side of the image in which the search runs."""

MARGIN = 16
"""Rows and columns added around it, so that subjects may reach over the edge."""

PADDED = GRID + 2 * MARGIN

EDGE = 8
"""Rows and columns at the edge of the image where no centre is looked for."""

EXAMPLES = 40
SOFTNESS_PX = 1.2
HALF_SIZES_TRIED = tuple(float(half) for half in np.geomspace(0.125, 0.42, 17))
ANGLES_TRIED = (-14.0, -7.0, 0.0, 7.0, 14.0)
MIRRORED_SHAPES = ("fish", "mug", "boat", "umbrella")
"""Shapes that change when left and right are exchanged."""

CLOSE, TELLING = 35.0, 60.0
"""Distances in RGB: still the same colour; certainly another."""

COMMON_SHARE = 0.3
FAMILIAR_WEIGHT = 0.15
LIGHT_WEIGHT = 0.4
OUTLINE_WEIGHT = 2.0
LEAST_SUPPORT = -0.08


@dataclass(frozen=True)
class Location:
    """Where a subject was found.

    Attributes:
        pose: The pose whose silhouette fits best.
        support: How well, from -1 to 1: mean evidence per pixel. True renders have 0.5 to 0.9, empty scenes -0.2.
    """

    pose: Pose
    support: float

    @property
    def is_found(self) -> bool:
        """Whether there is anything of this shape at all."""
        return self.support > LEAST_SUPPORT


def locate_subject(image: np.ndarray, shape: str) -> Location:
    """Find the pose in which a shape fits an image best.

    Every pixel is weighed three ways: how unlike it is to the backgrounds of the world at that place, how unlike to the
    outline's colour, and which of the two it is nearer to. The pose with the largest sum of these, over interior and
    outline, wins; all positions are tried at once by Fourier transform.

    Args:
        image: 8-bit RGB, (128, 128, 3).
        shape: A key of ``SHAPES``.

    Raises:
        InputError: The image has another shape or type.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise InputError(
            f"Expected an image as an 8-bit array of shape ({IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {image.dtype} of "
            f"shape {image.shape}. Convert it: np.asarray(image.convert('RGB'))."
        )
    interior, outline = _evidence(image)
    templates = _templates(shape)
    total = (
        _spectrum(interior) * templates.interiors
        + OUTLINE_WEIGHT * _spectrum(outline) * templates.outlines
    )
    inside = slice(MARGIN + EDGE, MARGIN + GRID - EDGE)
    scores = np.fft.irfft2(total)[:, inside, inside]
    number, row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    fitted = templates.poses[number]
    pose = replace(
        fitted,
        x=(int(column) + EDGE) / GRID,
        y=(int(row) + EDGE) / GRID,
        half_size=fitted.half_size * PADDED / GRID,
    )
    return Location(pose, float(scores[number, row, column] / templates.areas[number]))


@dataclass(frozen=True)
class _Templates:
    """Silhouettes in the middle of the padded grid: poses, Fourier transforms about the corner, weighted areas."""

    poses: tuple[Pose, ...]
    interiors: np.ndarray
    outlines: np.ndarray
    areas: np.ndarray


@lru_cache(maxsize=32)
def _templates(shape: str) -> _Templates:
    poses = tuple(
        Pose(0.5, 0.5, half * GRID / PADDED, angle, flipped)
        for half in HALF_SIZES_TRIED
        for angle in ((0.0,) if shape == "ball" else ANGLES_TRIED)
        for flipped in ((False, True) if shape in MIRRORED_SHAPES else (False,))
    )
    subject = Subject(shape, "solid", ((0, 0, 0),), (0,))
    masks = [_soft_masks(subject, pose) for pose in poses]
    interiors, outlines = (np.stack(kind) for kind in zip(*masks, strict=True))
    interior_spectra, outline_spectra = (
        np.conj(np.fft.rfft2(np.fft.ifftshift(kind, axes=(1, 2)))) for kind in (interiors, outlines)
    )
    areas = (interiors + OUTLINE_WEIGHT * outlines).sum(axis=(1, 2))
    return _Templates(poses, interior_spectra, outline_spectra, areas)


def _soft_masks(subject: Subject, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Share of each pixel that is interior, and outline or mark."""
    whole, inner = (
        mask.reshape(PADDED, 4, PADDED, 4).mean(axis=(1, 3), dtype=np.float32)
        for mask in subject_masks(subject, pose, 4 * PADDED)
    )
    return inner, whole - inner


@lru_cache(maxsize=len(BACKGROUNDS))
def _examples(background: str) -> np.ndarray:
    """Images of a background, (examples, grid, grid, 3), float32."""
    random = np.random.default_rng(0)
    crisp = [paint_background(background, IMAGE_SIZE, random) for _ in range(EXAMPLES // 2)]
    soft = [image.filter(ImageFilter.GaussianBlur(SOFTNESS_PX)) for image in crisp]
    return np.stack([_halve(np.asarray(image)) for image in crisp + soft])


def _halve(image: np.ndarray) -> np.ndarray:
    return image.reshape(GRID, 2, GRID, 2, 3).mean(axis=(1, 3), dtype=np.float32)


def _evidence(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weigh how far each pixel looks like a subject's interior and like its outline, (grid, grid) each."""
    small = _halve(image)
    distance = _background_distance(small)
    away = np.sqrt(((image.astype(np.float32) - OUTLINE) ** 2).sum(axis=-1))
    # lines are thin: the darker of each four pixels counts
    darkest = away.reshape(GRID, 2, GRID, 2).min(axis=(1, 3))
    outline = np.clip((distance - darkest) / TELLING, -LIGHT_WEIGHT, 1.0)
    strange = np.clip((distance - CLOSE) / CLOSE, -FAMILIAR_WEIGHT, 1.0)
    light = np.sqrt(((small - OUTLINE) ** 2).sum(axis=-1))
    return np.minimum(strange, np.clip((light - TELLING) / TELLING, -0.5, 1.0)), outline


def _background_distance(small: np.ndarray) -> np.ndarray:
    """Say how far each pixel is from all examples of the background that an image resembles most."""
    coarse = small[::3, ::3]

    def unlikeness(background: str) -> float:
        away = _distance_to(coarse, _examples(background)[:, ::3, ::3])
        return np.minimum(away, TELLING).mean()

    distance = _distance_to(small, _examples(min(BACKGROUNDS, key=unlikeness)))
    # what is off everywhere is the model's tint, not the subject
    return np.maximum(distance - np.quantile(distance, COMMON_SHARE), 0.0)


def _distance_to(image: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Distance in RGB of each pixel to the nearest pixel at its place, (height, width)."""
    return np.sqrt(((examples - image) ** 2).sum(axis=-1).min(axis=0))


def _spectrum(evidence: np.ndarray) -> np.ndarray:
    return np.fft.rfft2(np.pad(evidence, MARGIN).astype(np.float32))
