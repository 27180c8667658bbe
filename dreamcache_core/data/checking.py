"""``dreamcache dataset check``: read a whole set and say what is in it and what is wrong with it."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import DreamCacheError, FileFormatError, InputError
from ..images.masks import weak_mask
from ..images.sheets import contact_sheet, sheet_cell
from ..packages import require
from .augmentation import ALL_ALTERATIONS, Alterations, augment_reference
from .buckets import bucket_choice, crop_target, nearest_bucket
from .order import sample_seed
from .sources.reading import MaskError, located
from .sources.source import Pair, PairSource, spread

logger = logging.getLogger(__name__)

LEFT_OUT = "left out"
UNREADABLE = "unreadable files"
BAD_MASK = "empty or misfit masks"
FULL_MASK = "full masks"
TURNED_MASK = "masks of the background, turned round"
WEAK_MASK = "weak masks"
NO_CAPTION = "empty captions"

MAX_THREADS, NUM_WAITING = 8, 1024
NUM_NAMED = 3
FULL_FROM = 0.5
"""Least value of a mask that marks the whole image."""

LEAST_INSIDE = 0.5
"""Share of a target's mask that its crop should hold."""

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class SetReport:
    """What is in a set.

    Attributes:
        num_pairs: Complete pairs, readable or not; a repeated one counts once.
        num_samples: The same with repeats.
        problems: Kind to messages, each with its file; kinds without any are left out.
        sizes: Height and width of the targets, pixels, to how many there are; the most frequent first.
        num_enlarged: Targets with a side shorter than in training.
        num_cropped: Targets of whose mask training's crop holds less than half.
        num_transparent: Targets that are partly transparent: what is hidden there is background in training.
        num_without_mask: Pairs whose whole subject image is the reference.
        caption_words: Words of every readable pair's caption.
        caption_tokens: Name of every readable pair to its caption's tokens, start and end included; ``None``: not counted.
    """

    num_pairs: int
    num_samples: int
    problems: Mapping[str, tuple[str, ...]]
    sizes: Mapping[tuple[int, int], int]
    num_enlarged: int
    num_cropped: int
    num_transparent: int
    num_without_mask: int
    caption_words: tuple[int, ...]
    caption_tokens: Mapping[str, int] | None


class _Facts(NamedTuple):
    """What is known of a pair that can be read."""

    key: str
    size: tuple[int, int]
    has_mask: bool
    is_enlarged: bool
    is_cropped: bool
    is_transparent: bool
    num_words: int
    num_tokens: int


_Problems = tuple[tuple[str, str], ...]


def check_source(
    source: PairSource,
    *,
    resolution: int,
    has_buckets: bool = False,
    count_tokens: CountTokens | None = None,
    has_bar: bool = False,
) -> SetReport:
    """Read every pair of a set, several at a time.

    Args:
        source: The set.
        resolution: Side of square targets in training, pixels.
        has_buckets: Whether training keeps the targets' aspect.
        count_tokens: Counts the tokens of a caption; ``None``: not counted.
        has_bar: Whether to show a progress bar.

    Returns:
        The report.
    """
    count = len(source.distinct)
    examine = partial(_examine, source, bucket_choice(resolution, has_buckets), count_tokens)
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    # The readers hold warnings back, but not thread by thread: this keeps them from undoing each other.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            indices = source.distinct
            parts = (indices[i : i + NUM_WAITING] for i in range(0, count, NUM_WAITING))
            found = chain.from_iterable(pool.map(examine, part) for part in parts)
            results = list(
                tqdm(found, total=count, unit="pair", desc="checking", disable=not has_bar)
            )
        finally:
            pool.shutdown(cancel_futures=True)
    problems: dict[str, list[str]] = {LEFT_OUT: list(source.problems)} if source.problems else {}
    for kind, message in chain.from_iterable(doubts for doubts, _ in results):
        problems.setdefault(kind, []).append(message)
    read = [facts for _, facts in results if facts is not None]
    return SetReport(
        num_pairs=count,
        num_samples=len(source.keys),
        problems={kind: tuple(messages) for kind, messages in problems.items()},
        sizes=dict(Counter(facts.size for facts in read).most_common()),
        num_enlarged=sum(facts.is_enlarged for facts in read),
        num_cropped=sum(facts.is_cropped for facts in read),
        num_transparent=sum(facts.is_transparent for facts in read),
        num_without_mask=sum(not facts.has_mask for facts in read),
        caption_words=tuple(facts.num_words for facts in read),
        caption_tokens=None if count_tokens is None else {f.key: f.num_tokens for f in read},
    )


def warn_of_problems(source: PairSource, *, resolution: int, has_buckets: bool) -> None:
    """Read every pair of a set, and log a warning for each kind of problem.

    Args:
        source: The set; what it left out when it was opened was said then.
        resolution: Side of square targets in training, pixels.
        has_buckets: Whether training keeps the targets' aspect.
    """
    report = check_source(source, resolution=resolution, has_buckets=has_buckets, has_bar=True)
    for kind, messages in report.problems.items():
        if kind != LEFT_OUT:
            logger.warning(
                "%s (%d): %s%s",
                kind,
                len(messages),
                " ".join(messages[:NUM_NAMED]),
                " 'dataset check' lists more." if len(messages) > NUM_NAMED else "",
            )
    if report.num_without_mask:
        logger.warning(
            "%d of %d images have no mask: all of the image counts as the subject, and its background will leak into the "
            "results.",
            report.num_without_mask,
            report.num_pairs,
        )


def training_sheet(
    source: PairSource,
    *,
    resolution: int,
    num_samples: int,
    has_buckets: bool = False,
    alterations: Alterations = ALL_ALTERATIONS,
) -> Tensor | None:
    """Show targets and references as training sees them, from the whole length of a set.

    Args:
        source: The set.
        resolution: Side of both, pixels.
        num_samples: Most pairs to show; unreadable ones are passed over.
        has_buckets: Whether targets keep their aspect.
        alterations: What may happen to references.

    Returns:
        A contact sheet, a pair in a row; ``None`` where no pair can be shown.
    """
    sizes = bucket_choice(resolution, has_buckets)
    rows: list[tuple[Image.Image, Image.Image]] = []
    texts: list[tuple[str, str]] = []
    for index in spread(source, num_samples):
        generator = torch.Generator().manual_seed(sample_seed(0, index))
        try:
            pair = source.read(index)
            reference = augment_reference(
                pair.subject,
                pair.mask,
                size=resolution,
                generator=generator,
                alterations=alterations,
            )
        except DreamCacheError:
            continue
        height, width = pair.target.shape[1:3]
        size = nearest_bucket(height, width, sizes)
        rows.append((sheet_cell(crop_target(pair.target, *size)), sheet_cell(reference)))
        texts.append((pair.caption, source.keys[index]))
    return contact_sheet(rows, texts) if rows else None


def is_full(mask: Tensor) -> bool:
    """Tell whether a mask, of values in [0, 1], says nothing of where the subject is."""
    return float(mask.min()) >= FULL_FROM


def load_token_counter(folder: str | os.PathLike[str]) -> tuple[CountTokens, int]:
    """Load a tokenizer from its folder, or the first one of a diffusers pipeline.

    Returns:
        A function that counts tokens, start and end included, and how many the text encoder takes.

    Raises:
        InputError: There is no such folder.
        FileFormatError: It holds no tokenizer.
        MissingPackageError: transformers is not installed.
    """
    with require("transformers", "train"):
        from transformers import AutoTokenizer
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"Expected the folder of a tokenizer, got {folder}, which is none.")
    if (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise FileFormatError(
            f"Expected a tokenizer in {path}: {error} Give the folder 'tokenizer' of a diffusers model."
        ) from error

    def count(caption: str) -> int:
        return len(tokenizer(caption, truncation=False, verbose=False)["input_ids"])

    return count, tokenizer.model_max_length


def _examine(
    source: PairSource,
    sizes: Sequence[tuple[int, int]],
    count_tokens: CountTokens | None,
    index: int,
) -> tuple[_Problems, _Facts | None]:
    try:
        pair = source.read(index)
    except DreamCacheError as error:
        kind = BAD_MASK if isinstance(error, MaskError) else UNREADABLE
        return ((kind, located(source, index, str(error))),), None
    height, width = pair.target.shape[1:3]
    size = nearest_bucket(height, width, sizes)
    facts = _Facts(
        key=source.keys[index],
        size=(height, width),
        has_mask=pair.mask is not None,
        is_enlarged=height < size[0] or width < size[1],
        is_cropped=_share_inside(pair, size) < LEAST_INSIDE,
        is_transparent=pair.has_hidden_pixels,
        num_words=len(pair.caption.split()),
        num_tokens=count_tokens(pair.caption) if count_tokens else 0,
    )
    return tuple((kind, located(source, index, text)) for kind, text in _doubts(pair)), facts


def _share_inside(pair: Pair, size: tuple[int, int]) -> float:
    """Return which share of the target's mask its crop holds; 1 where the mask is another image's."""
    if pair.mask is None or pair.subject is not pair.target:
        return 1
    sides = pair.mask.shape[1:]
    factor = min(side / new for side, new in zip(sides, size, strict=True))
    rows, columns = (
        slice(round((side - new * factor) / 2), round((side + new * factor) / 2))
        for side, new in zip(sides, size, strict=True)
    )
    return float(pair.mask[:, rows, columns].sum() / pair.mask.sum())


def _doubts(pair: Pair) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a pair that can be read."""
    if pair.mask is not None and is_full(pair.mask):
        yield (
            FULL_MASK,
            "the mask marks the whole image, background included; mark the subject alone.",
        )
    if pair.is_turned:
        yield (
            TURNED_MASK,
            "the mask covers the border and leaves out the middle: it was turned round, as white marks the subject.",
        )
    weakness = "" if pair.mask is None else weak_mask(pair.mask)
    if weakness:
        yield WEAK_MASK, weakness
    if not pair.caption:
        yield NO_CAPTION, "the caption is empty; describe the image."
