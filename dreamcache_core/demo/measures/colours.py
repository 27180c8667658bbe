"""Colours as the eye tells them apart: CIE Lab."""

import numpy as np

SRGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
"""IEC 61966-2-1 (sRGB), linear light to CIE XYZ under illuminant D65."""

WHITE = SRGB_TO_XYZ.sum(axis=1)
DELTA = 6 / 29


def srgb_to_lab(colours: np.ndarray) -> np.ndarray:
    """Convert sRGB to CIE 1976 L*a*b* under illuminant D65, 2 degree observer.

    Source: IEC 61966-2-1 for the transfer curve and the primaries, CIE 015:2018 for L*a*b*. Distances in this space are
    CIE 1976 colour differences: about 2.3 is just noticeable, black and white are 100 apart.

    Args:
        colours: (..., 3), 8-bit, or float in [0, 255].

    Returns:
        Same shape, float64: L* in [0, 100], a* and b* roughly in [-110, 110].
    """
    value = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ SRGB_TO_XYZ.T / WHITE
    root = np.where(xyz > DELTA**3, np.cbrt(xyz), xyz / (3 * DELTA**2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
