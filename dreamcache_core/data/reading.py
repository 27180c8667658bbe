"""What all readers share: sizes, captions, masks that fit, what was left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import FileFormatError, InputError
from ..image_files import PictureFile, open_picture
from ..reference_image import check_image, subject_box, subject_opacity
from .source import Pair

logger = logging.getLogger(__name__)

ORIENTATION_TAG = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""

NUM_SHOWN = 3
"""Problems that the warning about a set names."""


class MaskError(InputError):
    """A mask marks no subject, or belongs to another picture."""


def picture_size(file: PictureFile, name: str | None = None) -> tuple[int, int]:
    """Read the size of a picture, as it is meant to be seen, from its header.

    Args:
        file: A picture file.
        name: What to call it in messages; ``None``: the file's own name.

    Returns:
        Height and width, pixels.

    Raises:
        InputError: There is no such file, or the picture is too large.
        FileFormatError: It is no picture.
    """
    with open_picture(file, name) as picture:
        width, height = picture.size
        # the method of the base class: that of PNG reads the whole picture in search of EXIF
        orientation = Image.Image.getexif(picture).get(ORIENTATION_TAG)
    return (width, height) if orientation in SIDEWAYS else (height, width)


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
) -> Pair:
    """Put a pair together; refuse a mask from which no reference can be made.

    Args:
        target: The picture to be generated, (1, height, width, 3).
        subject: Picture of its subject, (1, height, width, 3).
        alpha: Alpha channel of ``subject``, (1, height, width), if there is one.
        mask: Where the subject is, (1, height, width), any size of the same aspect. Alpha and mask are multiplied.
        caption: Text of the target.
        name: File of the mask, or of the picture whose alpha it is, for messages.

    Returns:
        The pair; its mask has the size of ``subject``.

    Raises:
        MaskError: The mask is empty, marks too little, or has another aspect than the picture.
        InputError: A picture is too small.
    """
    check_image(target)
    check_image(subject)
    image = subject if alpha is None else torch.cat([subject, alpha[..., None]], dim=-1)
    try:
        opacity = subject_opacity(image, mask)
        if opacity is not None:
            subject_box(opacity[0])
    except InputError as error:
        raise MaskError(f"{name}: {error}") from error
    return Pair(target, subject, opacity, caption)


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
            f"{first or 'Nothing in it looks like a picture with mask and caption.'}"
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
