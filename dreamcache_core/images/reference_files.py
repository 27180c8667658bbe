"""Reference images from files: read with their masks, and placed on plain squares."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .files import ImageFile, read_image, read_mask
from .masks import seems_turned, weak_mask
from .reference import check_mask_aspect, prepare_reference_image

logger = logging.getLogger(__name__)


def read_references(
    files: Sequence[ImageFile], masks: Sequence[ImageFile] = ()
) -> list[tuple[Tensor, Tensor | None]]:
    """Read images of a subject with their masks; warnings name those that have none, or one that is faint or of the background.

    Args:
        files: Image files.
        masks: A mask for each, white is the subject; none: the images' transparency.

    Returns:
        Each image, (1, height, width, 3) in [0, 1], and its mask, (1, height, width), or ``None``.

    Raises:
        FileFormatError: A file is no image, or is damaged.
        InputError: A file is missing or too large, or a mask has another aspect than its image.
    """
    if masks and len(masks) != len(files):
        raise InputError(
            f"Expected a mask for each of the {len(files)} reference images, in the same order, or none; given "
            f"{len(masks)}."
        )
    references: list[tuple[Tensor, Tensor | None]] = []
    bare: list[str] = []
    for index, file in enumerate(files):
        image, alpha = read_image(file)
        mask = read_mask(masks[index]) if masks else alpha
        if mask is not None:
            check_mask_aspect(mask, *image.shape[1:3])
            given = masks[index] if masks else file
            name = "A mask" if isinstance(given, bytes) else given
            if masks and seems_turned(mask[0]):
                mask = 1 - mask
                logger.warning(
                    "%s covers the border and leaves out the middle: it was turned round, as white marks the subject.",
                    name,
                )
            if weakness := weak_mask(mask):
                logger.warning("%s: %s", name, weakness)
        else:
            bare.append("an image" if isinstance(file, bytes) else Path(file).name)
        references.append((image, mask))
    if bare:
        logger.warning(
            "%s: no mask and no transparency, so the background will leak into the images. Give a mask, or a PNG whose "
            "background is transparent.",
            ", ".join(bare),
        )
    return references


def prepare_references(
    references: Sequence[tuple[Tensor, Tensor | None]], *, size: int, fill: float = 0.85
) -> Tensor:
    """Place each subject on a white square.

    Args:
        references: From ``read_references``.
        size: Side of the squares, pixels; see ``prepare_reference_image``.
        fill: Share of the side that the subject takes.

    Returns:
        (references, size, size, 3), float32 in [0, 1].

    Raises:
        InputError: See ``prepare_reference_image``.
    """
    prepared = [prepare_reference_image(*pair, size=size, fill=fill)[0] for pair in references]
    return torch.cat(prepared)
