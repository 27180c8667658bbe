"""Silhouettes of the demo world: each shape as polygons, holes and marks in a square from -1 to 1, y downwards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Points = np.ndarray

CURVE_POINTS = 40


@dataclass(frozen=True)
class Shape:
    """What a subject looks like but for its colours.

    Attributes:
        body: Polygons of shape (points, 2) whose union is the silhouette; it takes the pattern.
        holes: Polygons cut out of the body.
        marks: Polygons painted dark upon the pattern: eyes, a door.
    """

    body: Sequence[Points]
    holes: Sequence[Points] = ()
    marks: Sequence[Points] = ()


def _polygon(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=np.float64)


def _ellipse(
    x: float, y: float, width: float, height: float, start: float = 0.0, end: float = 360.0
) -> Points:
    angles = np.radians(np.linspace(start, end, CURVE_POINTS, endpoint=end - start < 360.0))
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], axis=1)


def _spikes(count: int, outer: float, inner: float, y: float = 0.0) -> Points:
    corners = np.arange(2 * count)
    radius = np.where(corners % 2 == 0, outer, inner)
    angles = math.pi * corners / count - math.pi / 2
    return np.stack([radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)


def _heart() -> Points:
    angles = np.linspace(0.0, 2 * math.pi, 2 * CURVE_POINTS, endpoint=False)
    x = 16 * np.sin(angles) ** 3
    y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    return np.stack([x / 16.5, (-y - 2.5) / 15.5], axis=1)


def _ghost() -> Points:
    dome = _ellipse(0.0, -0.2, 0.75, 0.75, 180.0, 360.0)
    hem_x = np.linspace(0.75, -0.75, 7)
    hem_y = np.where(np.arange(7) % 2 == 0, 0.95, 0.62)
    return np.concatenate([dome, np.stack([hem_x, hem_y], axis=1)])


def _petals(count: int, distance: float, radius: float) -> list[Points]:
    angles = 2 * math.pi * np.arange(count) / count - math.pi / 2
    return [
        _ellipse(distance * math.cos(a), distance * math.sin(a), radius, radius) for a in angles
    ]


SHAPES: Mapping[str, Shape] = {
    "ball": Shape([_ellipse(0, 0, 0.88, 0.88)]),
    "star": Shape([_spikes(5, 1.0, 0.46, y=0.08)]),
    "heart": Shape([_heart()]),
    "house": Shape(
        [
            _polygon((-0.7, -0.15), (0.7, -0.15), (0.7, 0.9), (-0.7, 0.9)),
            _polygon((-0.95, -0.1), (0, -0.95), (0.95, -0.1)),
        ],
        marks=[_polygon((-0.2, 0.9), (-0.2, 0.35), (0.2, 0.35), (0.2, 0.9))],
    ),
    "fish": Shape(
        [_ellipse(-0.2, 0, 0.75, 0.56), _polygon((0.3, 0), (0.98, -0.6), (0.98, 0.6))],
        marks=[_ellipse(-0.58, -0.13, 0.11, 0.11)],
    ),
    "mug": Shape(
        [
            _polygon((-0.8, -0.75), (0.4, -0.75), (0.4, 0.85), (-0.8, 0.85)),
            _ellipse(0.4, 0.02, 0.56, 0.56),
        ],
        holes=[_ellipse(0.44, 0.02, 0.27, 0.27, -90, 90)],
    ),
    "tree": Shape(
        [
            _polygon((-0.2, 0.0), (0.2, 0.0), (0.26, 0.98), (-0.26, 0.98)),
            *(petal - (0, 0.22) for petal in _petals(5, 0.42, 0.4)),
            _ellipse(0, -0.22, 0.5, 0.5),
        ],
    ),
    "ghost": Shape(
        [_ghost()], marks=[_ellipse(-0.27, -0.25, 0.12, 0.16), _ellipse(0.27, -0.25, 0.12, 0.16)]
    ),
    "mushroom": Shape(
        [
            np.concatenate(
                [_ellipse(0, 0.08, 0.95, 0.95, 180, 360), _polygon((0.95, 0.2), (-0.95, 0.2))]
            ),
            _polygon((-0.32, 0.1), (0.32, 0.1), (0.42, 0.95), (-0.42, 0.95)),
        ],
    ),
    "rocket": Shape(
        [
            np.concatenate(
                [_ellipse(0, -0.1, 0.42, 0.88, 180, 360), _polygon((0.42, 0.7), (-0.42, 0.7))]
            ),
            _polygon((-0.35, 0.1), (-0.85, 0.92), (0, 0.68), (0.85, 0.92), (0.35, 0.1)),
        ],
        marks=[_ellipse(0, -0.3, 0.18, 0.18)],
    ),
    "flower": Shape(
        [*_petals(6, 0.58, 0.38), _ellipse(0, 0, 0.5, 0.5)], marks=[_ellipse(0, 0, 0.22, 0.22)]
    ),
    "cat": Shape(
        [
            _ellipse(0, 0.15, 0.85, 0.75),
            _polygon((-0.82, 0.1), (-0.78, -0.95), (-0.12, -0.5)),
            _polygon((0.82, 0.1), (0.78, -0.95), (0.12, -0.5)),
        ],
        marks=[
            _ellipse(-0.33, 0.05, 0.12, 0.12),
            _ellipse(0.33, 0.05, 0.12, 0.12),
            _polygon((-0.12, 0.38), (0.12, 0.38), (0, 0.54)),
        ],
    ),
    "boat": Shape(
        [
            _polygon((-0.98, 0.35), (0.98, 0.35), (0.62, 0.9), (-0.62, 0.9)),
            _polygon((-0.07, -0.98), (0.07, -0.98), (0.07, 0.4), (-0.07, 0.4)),
            _polygon((0.03, -0.95), (0.85, 0.15), (0.03, 0.15)),
            _polygon((-0.03, -0.7), (-0.65, 0.15), (-0.03, 0.15)),
        ],
    ),
    "umbrella": Shape(
        [
            np.concatenate(
                [
                    _ellipse(0, 0.05, 0.98, 0.95, 180, 360),
                    _polygon((0.65, -0.1), (0.33, 0.05), (0, -0.1), (-0.33, 0.05), (-0.65, -0.1)),
                ]
            ),
            _polygon((-0.08, -0.2), (0.08, -0.2), (0.08, 0.7), (-0.08, 0.7)),
            _polygon(
                (0.08, 0.7), (0.08, 0.86), (-0.42, 0.86), (-0.42, 0.55), (-0.26, 0.55), (-0.26, 0.7)
            ),
        ],
    ),
    "butterfly": Shape(
        [
            _ellipse(-0.5, -0.35, 0.46, 0.5),
            _ellipse(0.5, -0.35, 0.46, 0.5),
            _ellipse(-0.42, 0.42, 0.36, 0.4),
            _ellipse(0.42, 0.42, 0.36, 0.4),
        ],
        marks=[_ellipse(0, 0, 0.12, 0.8)],
    ),
    "crown": Shape(
        [
            _polygon(
                (-0.85, 0.75),
                (-0.98, -0.55),
                (-0.45, 0.05),
                (0, -0.8),
                (0.45, 0.05),
                (0.98, -0.55),
                (0.85, 0.75),
            ),
        ],
    ),
}
"""Every shape by its word in captions."""

UNSEEN_SHAPES = ("butterfly", "crown")
"""Shapes that the base model knows and that the training of the adapters never shows."""
