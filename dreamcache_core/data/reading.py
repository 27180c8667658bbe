"""What all readers share: pictures from bytes, masks that fit, captions, what was left out."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import FileFormatError, InputError
from ..image_files import (
    _READ_ERRORS,
    _check_size,
    _known_formats,
    _picture_to_tensor,
    _to_plain_mode,
    _too_large,
)
from ..reference_image import _bounding_box, _subject_opacity, check_image
from .source import Pair

logger = logging.getLogger(__name__)

ORIENTATION_TAG = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""

NUM_SHOWN = 3
"""Problems that the warning about a set names."""


class MaskError(InputError):
    """A mask marks no subject, or belongs to another picture."""


def picture_size(file: str | os.PathLike[str] | bytes, name: str) -> tuple[int, int]:
    """Read the size of a picture, as it is meant to be seen, from its header.

    Args:
        file: Path, or contents, of a picture file.
        name: What to call it in messages.

    Returns:
        Height and width, pixels.

    Raises:
        InputError: The picture is too large.
        FileFormatError: There is no such file, or it is no picture.
    """
    with _opened(file, name) as picture:
        width, height = picture.size
        # the method of the base class: that of PNG reads the whole picture in search of EXIF
        orientation = Image.Image.getexif(picture).get(ORIENTATION_TAG)
    return (width, height) if orientation in SIDEWAYS else (height, width)


def decode_picture(data: bytes, name: str) -> tuple[Tensor, Tensor | None]:
    """Read a picture from bytes, as ``read_image`` does from a file.

    Args:
        data: Contents of a picture file.
        name: What to call it in messages.

    Returns:
        The picture, (1, height, width, 3), float32 in [0, 1], and its alpha, (1, height, width), or ``None`` where
        all is opaque.

    Raises:
        InputError: The picture is too large.
        FileFormatError: It is none, or is damaged.
    """
    with _opened(data, name) as picture:
        pixels = _picture_to_tensor(_to_plain_mode(ImageOps.exif_transpose(picture)))
    image, alpha = pixels[..., :3].contiguous(), pixels[..., 3:]  # alpha has 0 or 1 channel
    return image, None if bool((alpha == 1).all()) else alpha[..., 0].contiguous()


def decode_mask(data: bytes, name: str) -> Tensor:
    """Read a mask from bytes, as ``read_mask`` does from a file.

    Args:
        data: Contents of a picture file.
        name: What to call it in messages.

    Returns:
        (1, height, width), float32 in [0, 1].

    Raises:
        InputError: The picture is too large.
        FileFormatError: It is none, or is damaged.
    """
    image, alpha = decode_picture(data, name)
    grey = image.mean(dim=-1)
    return grey if alpha is None else grey * alpha


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
        opacity = _subject_opacity(image, mask)
        if opacity is not None:
            _bounding_box(opacity[0], 0)
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


@contextmanager
def _opened(file: str | os.PathLike[str] | bytes, name: str) -> Iterator[Image.Image]:
    """Open a picture; what goes wrong while it is open becomes an error of ours."""
    formats = _known_formats()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of odd EXIF blocks
            stream = io.BytesIO(file) if isinstance(file, bytes) else file
            with Image.open(stream, formats=formats) as picture:
                _check_size(picture, Path(name))
                yield picture
    except (InputError, FileFormatError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(Path(name), str(error)) from error
    except _READ_ERRORS as error:
        raise FileFormatError(
            f"Expected a picture file ({', '.join(formats)}), got {name}, which cannot be read: {error}. The file is "
            "missing, damaged or of another kind; fetch it again or save it as PNG."
        ) from error
