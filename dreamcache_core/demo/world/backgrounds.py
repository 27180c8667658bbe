"""Backgrounds of the demo world, drawn with Pillow at twice the size of the image."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Painter = Callable[[ImageDraw.ImageDraw, int, np.random.Generator], None]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Background:
    """One place in which a subject may stand.

    Attributes:
        phrases: Wordings in captions, each standing after the subject: ``on the grass``.
        paint: Paints it: takes the drawing, its side in pixels and the source of everything random.
    """

    phrases: tuple[str, ...]
    paint: Painter


def _fill(draw: ImageDraw.ImageDraw, size: int, top: float, bottom: float, colour: Colour) -> None:
    draw.rectangle((0, round(top * size), size, round(bottom * size)), fill=colour)


def _disc(
    draw: ImageDraw.ImageDraw, size: int, x: float, y: float, radius: float, colour: Colour
) -> None:
    box = ((x - radius) * size, (y - radius) * size, (x + radius) * size, (y + radius) * size)
    draw.ellipse(box, fill=colour)


def _shapes(
    draw: ImageDraw.ImageDraw, size: int, points: list[tuple[float, float]], colour: Colour
) -> None:
    draw.polygon([(x * size, y * size) for x, y in points], fill=colour)


def _wave(
    draw: ImageDraw.ImageDraw,
    size: int,
    y: float,
    height: float,
    length: float,
    phase: float,
    colour: Colour,
) -> None:
    x = np.linspace(0.0, 1.0, 65)
    crest = y + height * np.sin(2 * np.pi * (x / length + phase))
    _shapes(
        draw, size, [*zip(x.tolist(), crest.tolist(), strict=True), (1.0, 1.0), (0.0, 1.0)], colour
    )


def _grass(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (150, 205, 245))
    horizon = random.uniform(0.46, 0.54)
    _fill(draw, size, horizon, 1, (95, 180, 75))
    for row in range(3):
        for x in np.arange(0.06 + 0.06 * (row % 2), 1.0, 0.14):
            y = horizon + 0.14 + 0.14 * row
            _shapes(draw, size, [(x - 0.02, y), (x, y - 0.07), (x + 0.02, y)], (55, 135, 50))


def _beach(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 0.3, (190, 230, 250))
    _disc(draw, size, random.choice([0.15, 0.85]), 0.13, 0.08, (255, 225, 90))
    _fill(draw, size, 0.3, 1, (60, 150, 215))
    _wave(draw, size, random.uniform(0.5, 0.56), 0.02, 0.5, random.uniform(0, 1), (240, 215, 150))


def _night(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (25, 28, 75))
    side = random.choice([0.16, 0.84])
    _disc(draw, size, side, 0.16, 0.1, (250, 245, 200))
    _disc(draw, size, side + 0.05, 0.13, 0.08, (25, 28, 75))
    for x, y in zip(
        np.arange(0.1, 1.0, 0.2), random.permutation([0.1, 0.32, 0.5, 0.68, 0.88]), strict=False
    ):
        _disc(draw, size, x, y, 0.016, (255, 255, 230))


def _snow(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (140, 165, 195))
    _wave(draw, size, random.uniform(0.55, 0.62), 0.04, 0.9, random.uniform(0, 1), (245, 248, 255))
    for x in np.arange(0.08, 1.0, 0.2):
        for y in (0.08, 0.26, 0.44):
            _disc(
                draw,
                size,
                x + random.uniform(-0.04, 0.04),
                y + random.uniform(-0.04, 0.04),
                0.022,
                (255, 255, 255),
            )


def _desert(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (250, 205, 140))
    _disc(draw, size, random.uniform(0.2, 0.8), 0.16, 0.11, (235, 95, 60))
    _wave(draw, size, 0.5, 0.06, 1.1, random.uniform(0, 1), (215, 150, 80))
    _wave(draw, size, 0.72, 0.05, 0.8, random.uniform(0, 1), (190, 120, 60))


def _sea(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (175, 220, 240))
    for row, colour in enumerate([(70, 145, 205), (50, 120, 185), (35, 95, 160), (25, 75, 135)]):
        _wave(draw, size, 0.36 + 0.17 * row, 0.03, 0.34, random.uniform(0, 1), colour)


def _wall(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (215, 200, 185))
    shift = random.uniform(0, 0.25)
    for row in range(8):
        top = row * 0.125
        for column in range(-1, 5):
            left = column * 0.25 + shift + 0.125 * (row % 2)
            box = (
                (left + 0.012) * size,
                (top + 0.012) * size,
                (left + 0.238) * size,
                (top + 0.113) * size,
            )
            draw.rectangle(box, fill=(175, 85, 65))


def _room(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (235, 225, 200))
    left = random.choice([0.08, 0.64])
    draw.rectangle(
        (left * size, 0.08 * size, (left + 0.28) * size, 0.38 * size), fill=(255, 255, 255)
    )
    draw.rectangle(
        ((left + 0.025) * size, 0.105 * size, (left + 0.255) * size, 0.355 * size),
        fill=(150, 200, 235),
    )
    _fill(draw, size, 0.64, 1, (165, 110, 65))
    for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        line = (x * size, 0.64 * size, (1.6 * x - 0.3) * size, size)
        draw.line(line, fill=(120, 75, 40), width=max(1, size // 100))


def _kitchen(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (160, 215, 195))
    _fill(draw, size, 0.5, 1, (240, 240, 235))
    odd = int(random.integers(2))
    for row in range(4):
        for column in range(8):
            if (row + column + odd) % 2:
                box = (column * 0.125 * size, (0.5 + row * 0.125) * size)
                draw.rectangle(
                    (*box, box[0] + 0.125 * size, box[1] + 0.125 * size), fill=(70, 70, 80)
                )


def _city(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (245, 175, 150))
    heights = random.permutation([0.2, 0.42, 0.3, 0.5, 0.35])
    for number, top in enumerate(heights):
        left = number * 0.2
        draw.rectangle(
            ((left + 0.01) * size, top * size, (left + 0.18) * size, 0.8 * size),
            fill=(110, 85, 125),
        )
        for y in np.arange(top + 0.05, 0.72, 0.1):
            for x in (left + 0.045, left + 0.11):
                draw.rectangle(
                    (x * size, y * size, (x + 0.035) * size, (y + 0.045) * size),
                    fill=(250, 225, 130),
                )
    _fill(draw, size, 0.78, 1, (95, 95, 100))


def _forest(draw: ImageDraw.ImageDraw, size: int, random: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (50, 95, 75))
    for left in np.arange(0.06, 1.0, 0.2) + random.uniform(-0.05, 0.05):
        draw.rectangle((left * size, 0, (left + 0.08) * size, 0.75 * size), fill=(85, 60, 45))
    _fill(draw, size, 0.72, 1, (110, 80, 50))


def _paper(draw: ImageDraw.ImageDraw, size: int, _: np.random.Generator) -> None:
    _fill(draw, size, 0, 1, (255, 255, 255))


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
    image = Image.new("RGB", (size, size))
    BACKGROUNDS[name].paint(ImageDraw.Draw(image), size, random)
    return image
