"""Image files in and out, by Pillow; knows nothing of models or of how a reference is placed."""

import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from uuid import uuid4

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ..errors import DreamCacheError, FileFormatError, InputError
from ..files.whole_files import whole_file
from .colour_profiles import colours_in_srgb
from .tensors import clear_grey, image_to_tensor, tensor_to_image

ImageFile: TypeAlias = str | os.PathLike[str] | bytes
"""An image file by its path, or its contents."""

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused from their header alone."""

MAX_PIXELS_OF = {
    "TIFF": 60_000_000,
    "CMYK": 50_000_000,
    "AVIF": 40_000_000,
    "WEBP": 32_000_000,
    "JPEG2000": 20_000_000,
}
"""The same of formats and modes whose decoders keep more than the image, up to 24 bytes for a pixel."""

BITS_TAG, PHOTOMETRIC_TAG, SAMPLE_FORMAT_TAG, SIGNED = 258, 262, 339, 2
"""Tags of TIFF, and a value of the last."""

MAX_KEPT_PIXELS = 2**24
"""Images with more are shrunk before they become tensors, which take four times the room."""

GREY_STEPS = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies the values of a PNG of 2 or 4 bits with."""

STRIP_PIXELS = 2**20
"""A large image is converted so many pixels at a time, about."""

# Formats that Pillow decodes by itself; EPS, which would start another program, is not among them.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF", "PPM")

_READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,  # AVIF decoder
    MemoryError,  # JPEG 2000 decoder, of damaged sizes
    struct.error,
    zlib.error,
)

_NOT_IMAGES = {
    b"<!doctype html": "a web page (HTML)",
    b"<html": "a web page (HTML)",
    b"version https://git-lfs": "a Git LFS pointer",
}


@contextmanager
def open_image(file: ImageFile, name: str | None = None) -> Iterator[Image.Image]:
    """Open an image; nothing but its header is read until its pixels are asked for.

    What goes wrong while it is open becomes an error of ours, and Pillow's warnings are held back.

    Args:
        file: A PNG, JPEG, WebP, BMP, TIFF, GIF, ... file of at most 100 megapixels (TIFF 60, CMYK 50, AVIF 40, WebP 32, JPEG 2000 20).
        name: What to call it in messages; ``None``: the file's own name.

    Yields:
        The image as it is stored.

    Raises:
        InputError: There is no such file, or the image is too large.
        FileFormatError: The file is no image, or is damaged.
    """
    name = name or ("an image" if isinstance(file, bytes) else Path(file).name)
    try:
        with warnings.catch_warnings(), _open_bytes(file) as stream:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of odd EXIF blocks
            _refuse_known_others(stream.read(256), name)
            stream.seek(0)
            with Image.open(stream, formats=_known_formats()) as image:
                kinds = image.format or "", image.mode
                most = min(MAX_PIXELS_OF.get(kind, MAX_PIXELS) for kind in kinds)
                if image.width * image.height > most:
                    raise _too_large(name, f"{image.width} x {image.height} pixels", most)
                _refuse_odd_values(image, name)
                yield image
    except DreamCacheError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error), MAX_PIXELS) from error
    except _READ_ERRORS as error:
        # what Pillow says of a kind that it does not know names an object of Python
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise FileFormatError(
            f"Expected an image file ({', '.join(_known_formats())}), got {name}, which cannot be read{reason}. The "
            "file is damaged, cut short or of another kind; fetch it again or save it as PNG."
        ) from error


@cache
def image_endings() -> tuple[str, ...]:
    """Endings of the names of images that are read, ``.png`` and so on."""
    known = _known_formats()
    return tuple(
        sorted(end for end, kind in Image.registered_extensions().items() if kind in known)
    )


def is_image_name(name: str) -> bool:
    """Whether a file, by its name, is an image that is read; those that begin with a dot are not."""
    return name.lower().endswith(image_endings()) and not os.path.basename(name).startswith(".")


def read_image(file: ImageFile, name: str | None = None) -> tuple[Tensor, Tensor | None]:
    """Read an image as it is meant to be seen, and its alpha channel.

    EXIF orientation is applied. Greyscale, palette, 16-bit and CMYK images become RGB, and colours
    of 8 bits with an ICC profile sRGB. Of an animation the first frame is read. Images above 16 megapixels are
    shrunk by a whole number, each pixel the mean of those it covers.

    Args:
        file: A PNG, JPEG, WebP, BMP, TIFF, GIF, ... file of at most 100 megapixels (TIFF 60, CMYK 50, AVIF 40, WebP 32, JPEG 2000 20).
        name: What to call it in messages; ``None``: the file's own name.

    Returns:
        The image, (1, height, width, 3), float32 in [0, 1], and its alpha as a mask,
        (1, height, width), 1 = opaque = subject, or None where there is no alpha or all is opaque.
        Colours are as stored: not multiplied by alpha.

    Raises:
        InputError: There is no such file, or the image is too large.
        FileFormatError: The file is no image, or is damaged.
    """
    with open_image(file, name) as opened:
        clear = _transparent_colour(opened)
        plain = _shrink_to_plain_mode(opened, clear)
        ImageOps.exif_transpose(plain, in_place=True)
    del opened
    alpha = None
    if plain.mode == "RGBA":
        alpha = image_to_tensor(plain.getchannel("A"))[..., 0]
        plain = plain.convert("RGB")
    return image_to_tensor(plain), None if alpha is None or bool((alpha == 1).all()) else alpha


def read_mask(file: ImageFile, name: str | None = None) -> Tensor:
    """Read a mask: white is the subject, black and transparent are not.

    Args:
        file: See ``read_image``.
        name: See ``read_image``.

    Returns:
        (1, height, width), float32 in [0, 1]: the mean of red, green and blue, times alpha.

    Raises:
        DreamCacheError: See ``read_image``.
    """
    image, alpha = read_image(file, name)
    grey = image.mean(dim=-1)
    return grey if alpha is None else grey * alpha


def save_png(
    path: str | os.PathLike[str], image: Tensor, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one image as an 8-bit PNG with text chunks; the file appears whole or not at all.

    Args:
        path: The file to write, in an existing folder; an older file is replaced.
        image: (1, height, width, 3), any float dtype, in [0, 1]; values outside are clamped.
        metadata: Key to text. Keys have 1 to 79 Latin-1 characters; texts may be any Unicode.

    Raises:
        InputError: The image is misshapen or not finite, or there is no folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"Expected an existing folder to write to, got {path.parent}. Create it.")
    content = encode_png(image, metadata)
    with whole_file(path, by=uuid4().hex) as temporary:
        temporary.write_bytes(content)


def encode_png(image: Tensor, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return what ``save_png`` writes.

    Args:
        image: (1, height, width, 3), any float dtype, in [0, 1]; values outside are clamped. Or a
            mask, (1, height, width): the file is then greyscale.
        metadata: Text chunks, see ``save_png``.

    Returns:
        The contents of an 8-bit PNG file.

    Raises:
        InputError: The image is misshapen or not finite.
    """
    if image.ndim == 3:
        pil_image = tensor_to_image(image[..., None].expand(-1, -1, -1, 3)).convert("L")
    else:
        pil_image = tensor_to_image(image)
    chunks = PngImagePlugin.PngInfo()
    for key, text in (metadata or {}).items():
        chunks.add_text(key, text)
    stream = io.BytesIO()
    pil_image.save(stream, format="PNG", pnginfo=chunks)
    return stream.getvalue()


def _open_bytes(file: ImageFile) -> BinaryIO:
    if isinstance(file, bytes):
        return io.BytesIO(file)
    path = Path(file)
    if not path.is_file():
        raise InputError(f"Expected an image file, got {path}, which is none. Check the path.")
    return path.open("rb")


def _refuse_known_others(head: bytes, name: str) -> None:
    """Refuse empty files, web pages and Git LFS pointers by name."""
    head = head.lstrip().lower()
    kinds = [kind for start, kind in _NOT_IMAGES.items() if head.startswith(start)]
    if kinds or not head:
        raise FileFormatError(
            f"Expected an image file, got {name}, which is {kinds[0] if head else 'an empty file'}. Download the image "
            "itself again."
        )


def _refuse_odd_values(image: Image.Image, name: str) -> None:
    """Refuse a TIFF whose values Pillow takes for others: of 12 bits, signed, or deep with white as 0."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_TAG, ())
    is_signed = SIGNED in tags.get(SAMPLE_FORMAT_TAG, ()) and 32 not in bits
    is_negative = tags.get(PHOTOMETRIC_TAG) == 0 and image.mode[0] in "IF"
    if is_negative or is_signed or 12 in bits:
        raise FileFormatError(
            f"Expected a TIFF of 8 or 16 bits without signs, or of floats, with black as 0; got {name}. Save it so, or as PNG."
        )


def _known_formats() -> list[str]:
    """Return those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _too_large(name: str, given: str, most: int) -> InputError:
    """Return the error for an image with too many pixels."""
    return InputError(
        f"Expected an image of at most {most // 1_000_000} megapixels, got {name}: {given}. Make it smaller first; the "
        "subject is resized to a square of 512 to 1024 anyway."
    )


def _shrink_to_plain_mode(image: Image.Image, clear: object) -> Image.Image:
    """Convert an image strip by strip, shrunk by a whole number where it has more than ``MAX_KEPT_PIXELS``; its EXIF stays."""
    if image.width * image.height > MAX_KEPT_PIXELS:
        # JPEG decodes to half a side, other kinds as they are
        image.draft(image.mode, (image.width // 2, image.height // 2))
    width, height = image.size
    factor = math.ceil(math.sqrt(width * height / MAX_KEPT_PIXELS))
    factors = min(factor, width), min(factor, height)
    step = factors[1] * math.ceil(STRIP_PIXELS / (width * factors[1]))
    strips = [
        _to_plain_mode(image.crop((0, top, width, min(top + step, height))), clear).reduce(factors)
        for top in range(0, height, step)
    ]
    plain = Image.new(strips[0].mode, (strips[0].width, sum(strip.height for strip in strips)))
    top = 0
    for strip in strips:
        plain.paste(strip, (0, top))
        top += strip.height
    plain.getexif().update(image.getexif())
    return plain


def _to_plain_mode(image: Image.Image, clear: object) -> Image.Image:
    """Convert to RGB or RGBA, in sRGB, or, where opaque greyscale is deeper than 8 bits, to I or F."""
    if image.mode == "F":
        return image
    if image.mode.startswith("I"):
        deep = image.convert("I")
        return clear_grey(deep, clear) if isinstance(clear, int) else deep
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info
    mode = "RGBA" if has_alpha else "RGB"
    # convert would copy what has the mode already
    return colours_in_srgb(image, image if image.mode == mode else image.convert(mode))


def _transparent_colour(image: Image.Image) -> object:
    """Return a PNG's transparent colour, if it has one, in the values that Pillow gives its pixels."""
    clear, tile = image.info.get("transparency"), getattr(image, "tile", None)
    stored = tile[0][3] if tile else None
    if isinstance(clear, int) and stored in GREY_STEPS:
        clear = image.info["transparency"] = clear * GREY_STEPS[stored]
    elif isinstance(clear, tuple) and stored == "RGB;16B":
        clear = image.info["transparency"] = tuple(value >> 8 for value in clear)
    return clear
