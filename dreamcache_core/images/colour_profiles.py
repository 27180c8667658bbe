"""Colours of images that carry an ICC profile, converted to sRGB, which all models know; knows no files."""

import io
import logging
from functools import cache

from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

_CHANNELS = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}


def colours_in_srgb(stored: Image.Image, plain: Image.Image) -> Image.Image:
    """Convert colours as the image's ICC profile says; a profile that is broken or of other channels counts as none.

    Args:
        stored: The image as it was opened, of 8 bits a channel, any mode.
        plain: The same of mode RGB or RGBA, by its numbers alone.

    Returns:
        Of the mode of ``plain``; alpha is left alone.
    """
    profile = stored.info.get("icc_profile")
    if not profile:
        return plain
    channels = _CHANNELS.get(stored.mode, "RGB")
    colours = (plain if channels == "RGB" else stored).convert(channels)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, channels, "RGB")
        converted = transform.apply(colours)
    except ImportError:
        warn_of_missing_littlecms()
        return plain
    except (ImageCms.PyCMSError, OSError, TypeError):  # TypeError: a TIFF whose profile is a number
        return plain
    if plain.mode == "RGBA":
        converted.putalpha(plain.getchannel("A"))
    return converted


@cache
def warn_of_missing_littlecms() -> None:
    """Say once that profiles are passed over."""
    logger.warning(
        "This build of Pillow has no LittleCMS: colour profiles of images are passed over, so that colours of wide-gamut "
        "photos come out wrong. Install Pillow's own wheel (pip install --force-reinstall pillow), or save such images as "
        "sRGB."
    )
