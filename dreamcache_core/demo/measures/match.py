"""Measures whether an image of the demo world shows a given subject; knows the world, not the model that drew it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from PIL import Image

from ...packages import require
from ..world.patterns import PATTERNS
from ..world.world import IMAGE_SIZE, OUTLINE, Pose, Subject, in_subject_frame, subject_masks
from .colours import srgb_to_lab
from .location import locate_subject

WORST_COLOUR_ERROR = 60.0
"""Mean colour difference, Lab units, from which on colours count as all wrong: about that of random other subjects."""

SAME_COLOUR = 20.0
"""Largest colour difference, Lab units, to the mean of a patch that still is of its colour."""

TOLD_APART = 5.0
"""How much nearer, Lab units, a pixel must be to its own patch's colour than to any other's."""

LEAST_CONTRAST = 20.0
"""Distance in RGB by which a subject's interior must be farther from the outline's colour than its outline is."""

GROWTHS, STEPS_PX = (0.96, 1.0, 1.04), (-1, 0, 1)
"""Sizes and shifts that are tried around the pose that was found."""

NUM_TRANSPORTED = 96
NUM_COMPARED = 500
TURNS = (-8.0, 0.0, 8.0)
SHIFTS = (-0.09, 0.0, 0.09)


@dataclass(frozen=True)
class SubjectMatch:
    """How well an image shows a subject.

    Attributes:
        colour_error: Mean colour difference, CIE 1976 Lab units, between the pixels of the subject's region and the
            subject's colours, each colour taking the share of the region that it has on the subject (optimal
            transport). 0 is perfect.
        pattern_agreement: Share of the region's pixels, 0 to 1, that look like the patch of the pattern they lie in:
            they are near the patch's mean colour and nearer to it than to that of any other patch. Blind to which
            colours these are.
        is_found: Whether there is anything of the subject's shape.
    """

    colour_error: float
    pattern_agreement: float
    is_found: bool

    @property
    def colour_score(self) -> float:
        """1 for no colour error, falling straight to 0 at ``WORST_COLOUR_ERROR``."""
        return max(0.0, 1.0 - self.colour_error / WORST_COLOUR_ERROR)

    @property
    def match(self) -> float:
        """Mean of colour score and pattern agreement, 0 to 1; 0 where nothing was found."""
        return (self.colour_score + self.pattern_agreement) / 2 if self.is_found else 0.0


def measure_match(image: np.ndarray | Image.Image, subject: Subject) -> SubjectMatch:
    """Measure how well an image shows a subject, wherever in it that may be.

    Args:
        image: RGB, 128 x 128; an array is 8-bit, (128, 128, 3).
        subject: Who should be in it.

    Raises:
        InputError: The image has another size or type.
        MissingPackageError: scipy is not installed.
    """
    pixels = np.asarray(image)
    location = locate_subject(pixels, subject.shape)
    pose, core, contrast = _settle(pixels, subject, location.pose)
    found = srgb_to_lab(pixels[core])
    rows, columns = np.nonzero(core)
    labels = _possible_labels(subject, pose, rows, columns)
    agreements = _agreements(found, labels, len(subject.colours))
    best = int(agreements.argmax())
    return SubjectMatch(
        _colour_error(found, subject, labels[best]),
        float(agreements[best]),
        location.is_found and contrast > LEAST_CONTRAST,
    )


def _settle(pixels: np.ndarray, subject: Subject, pose: Pose) -> tuple[Pose, np.ndarray, float]:
    """Move a pose by a pixel and a little in size to where the outline stands out most from the interior.

    Returns:
        The pose, the interior's mask without what the outline rubs off on, and how far the interior is farther from the
        outline's colour than its outline, RGB units.
    """
    away = np.sqrt(((pixels.astype(np.float64) - OUTLINE) ** 2).sum(axis=-1))
    best = (pose, np.zeros(away.shape, dtype=bool), -np.inf)
    for growth in GROWTHS:
        grown = replace(pose, half_size=pose.half_size * growth)
        whole, inner = subject_masks(subject, grown)
        core, outline = _core(inner), whole & ~inner
        for down, right in product(STEPS_PX, STEPS_PX):
            moved = np.roll(away, (-down, -right), axis=(0, 1))
            contrast = float(moved[core].mean() - moved[outline].mean())
            if contrast > best[2]:
                x, y = grown.x + right / IMAGE_SIZE, grown.y + down / IMAGE_SIZE
                settled = replace(grown, x=x, y=y)
                best = (settled, np.roll(core, (down, right), axis=(0, 1)), contrast)
    return best


def _core(inner: np.ndarray) -> np.ndarray:
    """Leave out the pixels that an outline rubs off on; a subject too thin for that keeps them."""
    core = inner.copy()
    core[1:] &= inner[:-1]
    core[:-1] &= inner[1:]
    core[:, 1:] &= inner[:, :-1]
    core[:, :-1] &= inner[:, 1:]
    return core if 3 * core.sum() > inner.sum() else inner


def _possible_labels(
    subject: Subject, pose: Pose, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Which colour covers each pixel, for the pattern in and around a pose, either way round.

    Returns:
        Index into the subject's colours, (poses, pixels).
    """
    if len(subject.colours) == 1:
        return np.zeros((1, len(rows)), dtype=np.intp)
    right, down = (columns + 0.5) / IMAGE_SIZE, (rows + 0.5) / IMAGE_SIZE
    draw, count = PATTERNS[subject.pattern].draw, len(subject.colours)
    labels: list[np.ndarray] = []
    for turn, flipped in product(TURNS, (False, True)):
        turned = replace(pose, angle=pose.angle + turn, flipped=flipped)
        x, y = in_subject_frame(right, down, turned)
        labels += [draw(x + dx, y + dy, count) for dx, dy in product(SHIFTS, SHIFTS)]
    return np.stack(labels)


def _agreements(found: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Share of pixels that look like the patch they lie in, for each way the pattern may lie.

    Args:
        found: Lab of each pixel, (pixels, 3).
        labels: Patch of each pixel, (ways, pixels).
        count: Number of patches.

    Returns:
        (ways,), 0 to 1.
    """
    thin = max(1, len(found) // NUM_COMPARED)
    found, labels = found[::thin], labels[:, ::thin]
    member = labels[:, None, :] == np.arange(count)[:, None]  # -> (ways, patches, pixels)
    sizes = member.sum(axis=2, keepdims=True)
    # a patch that the subject's shape hides is far from everything
    means = np.where(sizes, member.astype(np.float64) @ found / np.maximum(sizes, 1), 1e3)
    away = np.sqrt(((means[:, :, None] - found) ** 2).sum(axis=-1))
    own = np.where(member, away, 0.0).sum(axis=1)
    others = np.where(member, np.inf, away).min(axis=1)
    return ((own < SAME_COLOUR) & (own + TOLD_APART < others)).mean(axis=1)


def _colour_error(found: np.ndarray, subject: Subject, labels: np.ndarray) -> float:
    """Mean colour difference at the cheapest transport between found pixels and expected colours."""
    with require("scipy", "eval"):
        from scipy.optimize import linear_sum_assignment
        from scipy.spatial.distance import cdist
    chosen = np.linspace(0, len(found) - 1, min(NUM_TRANSPORTED, len(found))).astype(np.intp)
    wanted = srgb_to_lab(np.array(subject.colours))[labels[chosen]]
    costs = cdist(found[chosen], wanted)
    return float(costs[linear_sum_assignment(costs)].mean())
