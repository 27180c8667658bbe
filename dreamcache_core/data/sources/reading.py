"""What all readers share: sizes, captions, masks that fit, what was left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from ...errors import FileFormatError, InputError
from ...images.files import ImageFile, open_image
from ...images.reference import check_image, subject_box, subject_opacity
from .source import Pair, PairSource

logger = logging.getLogger(__name__)

WIDTH_TAG, HEIGHT_TAG, ORIENTATION_TAG = 0x0100, 0x0101, 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""

PNG_START = 8
"""Bytes before the first block of a PNG."""
EXIF_BLOCKS = {
    b"eXIf": b"",
    b"tEXt": b"Raw profile type exif",
    b"zTXt": b"Raw profile type exif",
    b"iTXt": b"XML:com.adobe.xmp",
}
"""Blocks of a PNG in which Pillow looks for the orientation, by what they begin with."""

STRONG_FROM = 0.9
"""A mask whose largest value is below this was saved in other values than black and white."""

NUM_SHOWN = 3
"""Problems that the warning about a set names."""


class MaskError(InputError):
    """A mask marks no subject, or belongs to another image."""


def image_size(file: ImageFile, name: str | None = None) -> tuple[int, int]:
    """Read the size of an image, as it is meant to be seen, from its header.

    Args:
        file: An image file.
        name: What to call it in messages; ``None``: the file's own name.

    Returns:
        Height and width, pixels.

    Raises:
        InputError: There is no such file, or the image is too large.
        FileFormatError: It is no image.
    """
    with open_image(file, name) as image:
        width, height = image.size
        is_png = isinstance(image, PngImageFile)
        if is_png and image.fp is not None and _has_late_exif(image.fp):
            exif = image.getexif()
        else:  # the method of the base class: that of PNG reads the whole image in search of EXIF
            exif = Image.Image.getexif(image)
        if image.format == "TIFF":  # Pillow may have turned the size already
            width, height = exif.get(WIDTH_TAG, width), exif.get(HEIGHT_TAG, height)
    return (width, height) if exif.get(ORIENTATION_TAG) in SIDEWAYS else (height, width)


def stamp_files(root: Path, files: Iterable[str]) -> str:
    """Tell the state of files without reading them.

    Args:
        root: Folder of the set; what is below it goes by its place there.
        files: Their paths.

    Returns:
        Name, size in bytes and time of change in nanoseconds of each.

    Raises:
        InputError: A file is not there.
    """
    above = os.path.join(root, "")
    return "; ".join(_stamp_file(file, file.removeprefix(above)) for file in files)


def _stamp_file(path: str, name: str) -> str:
    try:
        state = os.stat(path)
    except OSError as error:
        raise InputError(
            f"Expected the file {path}, which was there before: {error.strerror}. Put it back, or open the set again."
        ) from error
    return f"{name}, {state.st_size}, {state.st_mtime_ns}"


def located(source: PairSource, index: int, text: str) -> str:
    """Put the name of a pair and its files before a text about it."""
    return f"{source.keys[index]} ({', '.join(source.files(index))}): {text}"


def _has_late_exif(stream: IO[bytes]) -> bool:
    """Tell whether a PNG has a block that may hold its orientation after its pixels; where it stands is kept."""
    place, block, is_late = stream.tell(), PNG_START, False
    try:
        while True:
            stream.seek(block)
            head = stream.read(8)  # length and kind of the block; a checksum follows its contents
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if len(head) < 8 or kind == b"IEND":
                return False
            keyword = EXIF_BLOCKS.get(kind)
            if is_late and keyword is not None and stream.read(len(keyword)) == keyword:
                return True
            is_late = is_late or kind == b"IDAT"
            block += 8 + length + 4
    finally:
        stream.seek(place)


def decode_caption(data: bytes, name: str) -> str:
    """Read a caption from bytes; line breaks and runs of spaces become one space.

    Args:
        data: UTF-8 text, with or without a byte order mark.
        name: What to call it in messages.

    Returns:
        The caption, possibly empty.

    Raises:
        FileFormatError: It is not UTF-8.
    """
    try:
        return " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"Expected a caption in UTF-8, got {name}: {error}. Save it again as UTF-8 text."
        ) from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a file.

    Raises:
        FileFormatError: It cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FileFormatError(
            f"Expected a readable file, got {path}: {error.strerror}. Check its place and permissions."
        ) from error


def make_pair(
    target: Tensor,
    subject: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    caption: str,
    *,
    name: str,
    has_hidden_pixels: bool = False,
) -> Pair:
    """Put a pair together; refuse a mask from which no reference can be made.

    Args:
        target: The image to be generated, (1, height, width, 3).
        subject: Image of its subject, (1, height, width, 3).
        alpha: Alpha channel of ``subject``, (1, height, width), if there is one.
        mask: Where the subject is, (1, height, width), any size of the same aspect. Alpha and mask are multiplied.
        caption: Text of the target.
        name: File of the mask, or of the image whose alpha it is, for messages.
        has_hidden_pixels: Whether the target has an alpha channel of its own that is not opaque everywhere.

    Returns:
        The pair; its mask has the size of ``subject``.

    Raises:
        MaskError: The mask is empty, marks too little, or has another aspect than the image.
        InputError: An image is too small.
    """
    check_image(target)
    check_image(subject)
    image = subject if alpha is None else torch.cat([subject, alpha[..., None]], dim=-1)
    opacity = None
    try:
        opacity = subject_opacity(image, mask)
        if opacity is not None:
            subject_box(opacity[0])
    except InputError as error:
        weakness = "" if opacity is None else weak_mask(opacity)
        hint = f" Perhaps {weakness}" if weakness else ""
        raise MaskError(f"{name}: {error}{hint}") from error
    return Pair(target, subject, opacity, caption, has_hidden_pixels)


def weak_mask(mask: Tensor) -> str:
    """Say that a mask, (1, height, width) in [0, 1], nowhere reaches white; empty where it does or is black."""
    highest = float(mask.max())
    if not 0 < highest < STRONG_FROM:
        return ""
    return f"the mask has values up to {highest:.2g} of 1; save white as 255."


def printable(text: str) -> str:
    """Escape what is no Unicode in a text, such as a file name of another encoding."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")


def settle(path: Path, num_pairs: int, problems: Sequence[str]) -> tuple[str, ...]:
    """Say what was left out of a set; refuse a set of which nothing is left.

    Args:
        path: The set.
        num_pairs: Complete pairs.
        problems: What was left out, and why, one sentence each.

    Returns:
        The problems.

    Raises:
        InputError: There is no complete pair.
    """
    problems = tuple(map(printable, problems))
    first = " ".join(problems[:NUM_SHOWN])
    if not num_pairs:
        raise InputError(
            f"Expected at least one complete pair in {path}, found none. "
            f"{first or 'Nothing in it looks like an image with mask and caption.'}"
        )
    if problems:
        logger.warning(
            "%s: %d of %d samples are left out. %s%s",
            path,
            len(problems),
            num_pairs + len(problems),
            first,
            " 'dataset check' lists more." if len(problems) > NUM_SHOWN else "",
        )
    return problems
