"""Patterns of the demo world: which of a subject's colours covers which point of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

STRIPE, CHECK, DOT_SPACING = 0.5, 2 / 3, 0.7
"""Sizes in the subject's square: coarse enough for latents that each stand for 8 x 8 pixels."""


@dataclass(frozen=True)
class Pattern:
    """How colours cover a subject.

    Attributes:
        word: Adjective in captions.
        colours: Numbers of colours that it can be drawn with.
        draw: Takes x and y in the subject's square (-1 to 1) and the number of colours; returns each point's colour as
            an integer.
    """

    word: str
    colours: tuple[int, ...]
    draw: Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def _solid(x: np.ndarray, _y: np.ndarray, _colours: int) -> np.ndarray:
    return np.zeros(x.shape, dtype=np.intp)


def _stripes(_x: np.ndarray, y: np.ndarray, colours: int) -> np.ndarray:
    return np.floor((y + 1.0) / STRIPE).astype(np.intp) % colours


def _bars(x: np.ndarray, _y: np.ndarray, colours: int) -> np.ndarray:
    return np.floor((x + 1.0) / STRIPE).astype(np.intp) % colours


def _halves(x: np.ndarray, y: np.ndarray, colours: int) -> np.ndarray:
    return (x > 0.0).astype(np.intp) if colours == 2 else (y > 0.3).astype(np.intp) + (y > -0.3)


def _dots(x: np.ndarray, y: np.ndarray, colours: int) -> np.ndarray:
    row = np.floor((y + 1.5 * DOT_SPACING) / DOT_SPACING)
    column = (x + 1.5 * DOT_SPACING + DOT_SPACING / 2 * (row % 2)) / DOT_SPACING
    away = np.hypot(column % 1.0 - 0.5, ((y + 1.5 * DOT_SPACING) / DOT_SPACING) % 1.0 - 0.5)
    colour = 1 if colours == 2 else 1 + (np.floor(column) + row).astype(np.intp) % 2
    return np.where(away < 0.33, colour, 0)


def _checks(x: np.ndarray, y: np.ndarray, colours: int) -> np.ndarray:
    return (np.floor((x + 1.0) / CHECK) + np.floor((y + 1.0) / CHECK)).astype(np.intp) % colours


def _ring(x: np.ndarray, y: np.ndarray, colours: int) -> np.ndarray:
    away = np.hypot(x, y)
    return (
        (away < 0.5).astype(np.intp)
        if colours == 2
        else (away < 0.68).astype(np.intp) + (away < 0.34)
    )


PATTERNS: Mapping[str, Pattern] = {
    "solid": Pattern("plain", (1,), _solid),
    "stripes": Pattern("striped", (2, 3), _stripes),
    "bars": Pattern("barred", (2, 3), _bars),
    "halves": Pattern("parted", (2, 3), _halves),
    "dots": Pattern("dotted", (2, 3), _dots),
    "checks": Pattern("checked", (2, 3), _checks),
    "ring": Pattern("ringed", (2, 3), _ring),
}
"""Every pattern by its name."""
