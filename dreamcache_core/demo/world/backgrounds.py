"""Backgrounds of the demo world, drawn with Pillow at twice the size of the image."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]


class Canvas:
    """A square to paint on; lengths are fractions of its side.

    Args:
        size: Its side in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size, self.image = size, Image.new("RGB", (size, size))
        self._draw = ImageDraw.Draw(self.image)

    def band(self, top: float, bottom: float, colour: Colour) -> None:
        """Fill the whole width."""
        box = (0, round(top * self.size), self.size, round(bottom * self.size))
        self._draw.rectangle(box, fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill a rectangle."""
        self._draw.rectangle(self._scaled(left, top, right, bottom), fill=colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """Fill a circle."""
        box = self._scaled(x - radius, y - radius, x + radius, y + radius)
        self._draw.ellipse(box, fill=colour)

    def polygon(self, points: Iterable[tuple[float, float]], colour: Colour) -> None:
        """Fill a polygon."""
        self._draw.polygon([(x * self.size, y * self.size) for x, y in points], fill=colour)

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: Colour) -> None:
        """Draw a line, a hundredth of the side wide."""
        width = max(1, self.size // 100)
        self._draw.line(self._scaled(x, y, to_x, to_y), fill=colour, width=width)

    def wave(self, y: float, height: float, length: float, phase: float, colour: Colour) -> None:
        """Fill everything below a sine."""
        x = np.linspace(0.0, 1.0, 65)
        crest = y + height * np.sin(2 * np.pi * (x / length + phase))
        points = zip(x.tolist(), crest.tolist(), strict=True)
        self.polygon([*points, (1.0, 1.0), (0.0, 1.0)], colour)

    def _scaled(
        self, left: float, top: float, right: float, bottom: float
    ) -> tuple[float, float, float, float]:
        return left * self.size, top * self.size, right * self.size, bottom * self.size


@dataclass(frozen=True)
class Background:
    """One place in which a subject may stand.

    Attributes:
        phrases: Wordings in captions, each standing after the subject: ``on the grass``.
        paint: Paints it, from the source of everything random.
    """

    phrases: tuple[str, ...]
    paint: Callable[[Canvas, np.random.Generator], None]


def _grass(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (150, 205, 245))
    horizon = random.uniform(0.46, 0.54)
    canvas.band(horizon, 1, (95, 180, 75))
    for row in range(3):
        for x in np.arange(0.06 + 0.06 * (row % 2), 1.0, 0.14):
            y = horizon + 0.14 + 0.14 * row
            canvas.polygon([(x - 0.02, y), (x, y - 0.07), (x + 0.02, y)], (55, 135, 50))


def _beach(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 0.3, (190, 230, 250))
    canvas.disc(random.choice([0.15, 0.85]), 0.13, 0.08, (255, 225, 90))
    canvas.band(0.3, 1, (60, 150, 215))
    canvas.wave(random.uniform(0.5, 0.56), 0.02, 0.5, random.uniform(0, 1), (240, 215, 150))


def _night(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (25, 28, 75))
    side = random.choice([0.16, 0.84])
    canvas.disc(side, 0.16, 0.1, (250, 245, 200))
    canvas.disc(side + 0.05, 0.13, 0.08, (25, 28, 75))
    heights = random.permutation([0.1, 0.32, 0.5, 0.68, 0.88])
    for x, y in zip(np.arange(0.1, 1.0, 0.2), heights, strict=True):
        canvas.disc(x, y, 0.016, (255, 255, 230))


def _snow(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (140, 165, 195))
    canvas.wave(random.uniform(0.55, 0.62), 0.04, 0.9, random.uniform(0, 1), (245, 248, 255))
    for x in np.arange(0.08, 1.0, 0.2):
        for y in (0.08, 0.26, 0.44):
            right, down = random.uniform(-0.04, 0.04), random.uniform(-0.04, 0.04)
            canvas.disc(x + right, y + down, 0.022, (255, 255, 255))


def _desert(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (250, 205, 140))
    canvas.disc(random.uniform(0.2, 0.8), 0.16, 0.11, (235, 95, 60))
    canvas.wave(0.5, 0.06, 1.1, random.uniform(0, 1), (215, 150, 80))
    canvas.wave(0.72, 0.05, 0.8, random.uniform(0, 1), (190, 120, 60))


def _sea(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (175, 220, 240))
    for row, colour in enumerate([(70, 145, 205), (50, 120, 185), (35, 95, 160), (25, 75, 135)]):
        canvas.wave(0.36 + 0.17 * row, 0.03, 0.34, random.uniform(0, 1), colour)


def _wall(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (215, 200, 185))
    shift = random.uniform(0, 0.25)
    for row in range(8):
        top = row * 0.125
        for column in range(-1, 5):
            left = column * 0.25 + shift + 0.125 * (row % 2)
            canvas.box(left + 0.012, top + 0.012, left + 0.238, top + 0.113, (175, 85, 65))


def _room(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (235, 225, 200))
    left = random.choice([0.08, 0.64])
    canvas.box(left, 0.08, left + 0.28, 0.38, (255, 255, 255))
    canvas.box(left + 0.025, 0.105, left + 0.255, 0.355, (150, 200, 235))
    canvas.band(0.64, 1, (165, 110, 65))
    for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        canvas.line(x, 0.64, 1.6 * x - 0.3, 1.0, (120, 75, 40))


def _kitchen(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (160, 215, 195))
    canvas.band(0.5, 1, (240, 240, 235))
    odd = int(random.integers(2))
    for row in range(4):
        for column in range(8):
            if (row + column + odd) % 2:
                left, top = column * 0.125, 0.5 + row * 0.125
                canvas.box(left, top, left + 0.125, top + 0.125, (70, 70, 80))


def _city(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (245, 175, 150))
    for number, top in enumerate(random.permutation([0.2, 0.42, 0.3, 0.5, 0.35])):
        left = number * 0.2
        canvas.box(left + 0.01, top, left + 0.18, 0.8, (110, 85, 125))
        for y in np.arange(top + 0.05, 0.72, 0.1):
            for x in (left + 0.045, left + 0.11):
                canvas.box(x, y, x + 0.035, y + 0.045, (250, 225, 130))
    canvas.band(0.78, 1, (95, 95, 100))


def _forest(canvas: Canvas, random: np.random.Generator) -> None:
    canvas.band(0, 1, (50, 95, 75))
    for left in np.arange(0.06, 1.0, 0.2) + random.uniform(-0.05, 0.05):
        canvas.box(left, 0, left + 0.08, 0.75, (85, 60, 45))
    canvas.band(0.72, 1, (110, 80, 50))


def _paper(canvas: Canvas, _: np.random.Generator) -> None:
    canvas.band(0, 1, (255, 255, 255))


BACKGROUNDS: Mapping[str, Background] = {
    "grass": Background(("on the grass", "in a meadow"), _grass),
    "beach": Background(("on the beach", "at the seaside"), _beach),
    "night": Background(("at night", "under the stars"), _night),
    "snow": Background(("in the snow", "in winter"), _snow),
    "desert": Background(("in the desert", "on a dune"), _desert),
    "sea": Background(("in the sea", "on the waves"), _sea),
    "wall": Background(("in front of a wall", "at a brick wall"), _wall),
    "room": Background(("in a room", "on a wooden floor"), _room),
    "kitchen": Background(("in the kitchen", "on a tiled floor"), _kitchen),
    "city": Background(("in the city", "on the street"), _city),
    "forest": Background(("in the forest", "among trees"), _forest),
    "paper": Background(("on white paper", "on a white background"), _paper),
}
"""Every background by its name."""


def paint_background(name: str, size: int, random: np.random.Generator) -> Image.Image:
    """Paint one background.

    Args:
        name: A key of ``BACKGROUNDS``.
        size: Side in pixels.
        random: Source of what varies from image to image.

    Returns:
        RGB image of size x size.
    """
    canvas = Canvas(size)
    BACKGROUNDS[name].paint(canvas, random)
    return canvas.image
