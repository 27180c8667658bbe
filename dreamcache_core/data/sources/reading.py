"""What all readers share: sizes, captions, masks that fit, what was left out."""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Literal, TypeAlias

import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from ...errors import InputError
from ...images.files import ImageFile, open_image, read_image, read_mask
from ...images.masks import seems_turned, weak_mask
from ...images.reference import check_image, subject_box, subject_opacity
from ...names import printable
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

NUM_SHOWN = 3
"""Problems that the warning about a set names."""


Part = Literal["target", "subject", "mask"]

NamedFile: TypeAlias = tuple[ImageFile, str | None]
"""An image file, and what to call it in messages; ``None``: by its own name."""


class MaskError(InputError):
    """A mask marks no subject, or belongs to another image."""


def image_size(file: ImageFile, name: str | None = None) -> tuple[int, int]:
    """Read height and width of an image in pixels, as it is meant to be seen, from its header.

    Raises:
        InputError: There is no such file, or the image is too large.
        FileFormatError: It is no image; the message calls it ``name``, or by its own name.
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
    """Tell name, size in bytes and time of change in nanoseconds of files; those below ``root`` go by their place there.

    Raises:
        InputError: A file is not there.
    """
    above = os.path.join(root, "")
    try:
        states = [(file.removeprefix(above), os.stat(file)) for file in files]
    except OSError as error:
        raise InputError(
            f"Expected the file {error.filename}, which was there before: {error.strerror}. Put it back, or open the set "
            "again."
        ) from error
    return "; ".join(f"{name}, {state.st_size}, {state.st_mtime_ns}" for name, state in states)


def without_times(stamp: str) -> str:
    """Return a pair's stamp without the times that ``stamp_files`` wrote into it, which a plain copy does not keep."""
    return re.sub(r"(, \d+), -?\d+(?=; |$)", r"\1", stamp)


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


def one_line(text: str) -> str:
    """Replace line breaks and runs of spaces by one space."""
    return " ".join(text.split())


class FileSource(ABC):
    """A set whose images are files, or members of files."""

    keys: Sequence[str]

    @property
    def distinct(self) -> Sequence[int]:
        """All indices: nothing is repeated."""
        return range(len(self.keys))

    @abstractmethod
    def image(self, index: int, part: Part) -> NamedFile | None:
        """Find an image of a pair; ``None``: the pair has none of its own."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """Caption of a pair."""

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the target, pixels, from its header."""
        return image_size(*self._target(index))

    def read(self, index: int) -> Pair:
        """Read a pair; the alpha channel of the subject's image and the mask are multiplied.

        A mask that seems to mark the background is turned round.

        Raises:
            MaskError: The mask is empty, marks too little, or has another aspect than the image.
            DreamCacheError: A file is missing, damaged or unfit.
        """
        target_file = self._target(index)
        subject_file, mask_file = self.image(index, "subject"), self.image(index, "mask")
        target, alpha = read_image(*target_file)
        subject, has_hidden_pixels = target, alpha is not None
        if subject_file is not None:
            subject, alpha = read_image(*subject_file)
        mask = None if mask_file is None else read_mask(*mask_file)
        is_turned = mask is not None and seems_turned(mask[0])
        if mask is not None and is_turned:
            mask = 1 - mask
        caption = self.caption(index)
        check_image(target)
        check_image(subject)
        file, name = mask_file or subject_file or target_file
        opacity = _checked_opacity(subject, alpha, mask, name or str(file))
        has_own_subject = subject_file is not None
        return Pair(
            target, subject, opacity, caption, has_hidden_pixels, has_own_subject, is_turned
        )

    def _target(self, index: int) -> NamedFile:
        file = self.image(index, "target")
        assert file is not None
        return file


def _checked_opacity(
    subject: Tensor, alpha: Tensor | None, mask: Tensor | None, name: str
) -> Tensor | None:
    """Return where the subject is, if not everywhere; refuse what no reference can be made from."""
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
    return opacity


def require_pairs(path: Path, num_pairs: int, problems: Sequence[str]) -> tuple[str, ...]:
    """Say what was left out of a set, and return it printable; refuse a set of which nothing is left.

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
