"""``dreamcache dataset masks``: find the subject in images that have no mask, and write the masks where the set reads them."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..config import Config
from ..errors import DreamCacheError, InputError
from ..images.files import save_png
from .sources.captioned import CaptionedSource
from .sources.opening import open_source
from .sources.reading import located
from .synthetic.quality import QualityLimits, judge_mask
from .synthetic.segmentation import Segmenter, check_thresholds, load_segmenter

logger = logging.getLogger(__name__)

WRITTEN = "masks were written"
HAD = "had a mask, or transparent parts"
NOT_FOUND = "without a subject that was found"
UNREADABLE = "cannot be read"


@dataclass(frozen=True)
class MaskOptions(Config):
    """Find the subject in images that have no mask, and write it into masks/.

    Give the same command again to go on: masks that are there stay.

    Several processes share the work under ``accelerate launch``.

    Attributes:
        path: Folder of images with captions.
        model: Folder of CLIPSeg, local; of SAM with a detector.
        detector_model: Folder of Grounding DINO, local: it finds the subject, SAM its outline.
        subject: What to look for in every image; else its caption up to the first comma.
        mask_threshold: With CLIPSeg: least probability of a pixel of the subject.
        box_threshold: With a detector: least score of the subject's box.
        cpu: Use the CPU even where there is a GPU.
    """

    path: str
    model: str
    detector_model: str | None = None
    subject: str | None = None
    mask_threshold: float = 0.5
    box_threshold: float = 0.25
    cpu: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            InputError: A threshold is out of range.
        """
        check_thresholds(self.mask_threshold, self.box_threshold)


def make_masks(
    options: MaskOptions,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    device: torch.device | None = None,
    has_bar: bool = True,
) -> Counter[str]:
    """Write this process's part of the masks, ``masks/PLACE_OF_THE_IMAGE.png``, white where the subject is.

    A mask of doubtful form is written, and a warning names its image; so does one where no subject was found.

    Args:
        options: Where, and with which models.
        process_index: Of this process, from 0.
        num_processes: How many share the work.
        device: Where the models run; ``None``: the CPU.
        has_bar: Whether to show a progress bar.

    Returns:
        How many of this process's images had a mask or transparent parts, and what became of the others.

    Raises:
        DreamCacheError: It is no folder of images with captions, or no such models.
        OSError: A mask cannot be written; those before it are there.
    """
    source = open_source(options.path, options.subject)
    if not isinstance(source, CaptionedSource):
        raise InputError(
            f"Expected a folder of images with captions (X.png, X.txt), got {options.path}, a set of another form, which "
            "says itself where its masks are. Paint those, or give a folder of the images alone."
        )
    segment = load_segmenter(
        options.model,
        options.detector_model,
        flag="--model",
        mask_threshold=options.mask_threshold,
        box_threshold=options.box_threshold,
        device=torch.device("cpu") if device is None else device,
    )
    mine = source.distinct[process_index::num_processes]
    counts: Counter[str] = Counter()
    for index in tqdm(mine, unit="image", desc="masking", disable=not has_bar):
        outcome, doubt = _mask_image(source, index, options.subject, segment)
        counts[outcome] += 1
        if doubt:
            logger.warning("%s", located(source, index, doubt))
    return counts


def _mask_image(
    source: CaptionedSource, index: int, subject: str | None, segment: Segmenter
) -> tuple[str, str]:
    """Write an image's mask where it has none; return what became of it, and what is to be doubted."""
    if source.image(index, "mask") is not None:
        return HAD, ""
    try:
        pair = source.read(index)
    except DreamCacheError as error:
        return UNREADABLE, str(error)
    if pair.mask is not None:  # its transparent parts
        return HAD, ""
    name = subject or pair.caption.split(",")[0]
    mask = segment(pair.target, name)
    verdict = judge_mask(mask, QualityLimits())
    if verdict.reason == "no subject":
        return NOT_FOUND, f"{name!r} was not found; paint the mask, or name the subject otherwise."
    kept = mask if verdict.reason == "scattered" else verdict.mask
    path = source.new_mask(index)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, kept[..., None].float().expand(-1, -1, -1, 3))
    return WRITTEN, f"look at its mask, {path}: {verdict.reason}." if verdict.reason else ""
