"""``dreamcache dataset check``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from ..config import Config, check_range
from ..data.augmentation import ALL_ALTERATIONS, NO_ALTERATIONS
from ..data.checking import SetReport, check_source, load_token_counter, training_sheet
from ..data.sources.opening import open_source, refuse_within
from ..errors import InputError
from ..files.texts import read_json
from ..images.files import save_png
from ..method.cache import LATENT_FACTOR
from ..names import printable
from ..training.config import TrainConfig
from .parsing import parse_config

MAX_LISTED = 10
"""Problems of a kind, and image sizes, that are listed; the rest is counted."""


@dataclass(frozen=True)
class CheckOptions(Config):
    """Read a training set and say what is in it and what is wrong with it.

    Exit code: 0 all is well, 1 there are problems, 2 it is no training set.

    Attributes:
        path: Training set: folder, manifest, shards or parquet; as the first word it needs no flag.
        config: TOML file of a training run: set, captions, size and tokenizer as that run has them, where they are not given.
        caption: Caption of images that have none.
        resolution: Side of the images in training, pixels; else that of the tokenizer's model, or 512.
        buckets: Training keeps the aspect of targets, as buckets.
        keep_reference: Training leaves references as they are.
        out: PNG of targets and references to write.
        samples: Pairs in that image; 0: no image.
        tokenizer: Folder of a tokenizer or diffusers model: captions in tokens as well.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {"size": "It is called 'resolution' here."}

    path: str = ""
    config: str | None = None
    caption: str | None = None
    resolution: int | None = None
    buckets: bool = False
    keep_reference: bool = False
    out: str = "check.png"
    samples: int = 8
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Refuse, before the set is read, what would fail afterwards.

        Raises:
            InputError: A number is out of range, or the image cannot be written.
        """
        if not (self.path or self.config):
            raise InputError(
                "Expected a training set, or --config with a run's TOML file; given neither."
            )
        side = self.resolution
        if side is not None and (side % 8 or not 64 <= side <= 2048):
            raise InputError(
                f"--resolution must be a multiple of 8 in 64 ... 2048; given {self.resolution}."
            )
        check_range("--samples", self.samples, 0)
        out = Path(self.out)
        if out.suffix.lower() != ".png" or out.is_dir():
            raise InputError(f"--out must be a file ending in .png; given {out}.")
        if not out.parent.is_dir():
            raise InputError(f"There is no folder {out.parent}. Create it, or change --out.")


def run(options: CheckOptions) -> None:
    """Print what is in a set, and write an image of how training sees it.

    Raises:
        InputError: The image would become part of the set.
        SystemExit: There are problems (code 1).
    """
    if options.config:
        options = _as_in_training(options, options.config)
    count, limit = load_token_counter(options.tokenizer) if options.tokenizer else (None, None)
    refuse_within(options.out, options.path)
    source = open_source(options.path, options.caption)
    options = replace(options, resolution=options.resolution or _model_px(options.tokenizer))
    seen: Any = {"resolution": options.resolution, "has_buckets": options.buckets}
    report = check_source(source, **seen, count_tokens=count, has_bar=True)
    for line in _report_lines(report, options, limit):
        print(printable(line))
    alterations = NO_ALTERATIONS if options.keep_reference else ALL_ALTERATIONS
    sheet = training_sheet(source, **seen, num_samples=options.samples, alterations=alterations)
    if sheet is not None:
        save_png(options.out, sheet)
        print(printable(f"targets and references as training sees them: {options.out}"))
    if report.problems:
        raise SystemExit(1)


def _as_in_training(options: CheckOptions, file: str) -> CheckOptions:
    """Take from a run's file what it says of its set; what is given stays."""
    run = parse_config(TrainConfig, ["--config", file], program="dreamcache train")
    path = options.path or run.data
    if path is None:
        raise InputError(
            f"{file} names no data, only a precomputed set. Give the training set as well."
        )
    of_run = {
        "caption": run.caption,
        "resolution": run.resolution,
        "buckets": run.buckets,
        "keep_reference": run.keep_reference,
        "tokenizer": run.model if (Path(run.model) / "tokenizer").is_dir() else None,
    }
    unset = {
        key: value
        for key, value in of_run.items()
        if getattr(options, key) == getattr(CheckOptions, key)
    }
    return replace(options, path=path, **unset)


def _model_px(folder: str | None) -> int:
    """Side of the images that the model in a folder makes; 512 where it holds none."""
    file = Path(folder or "") / "unet" / "config.json"
    side = read_json(file).get("sample_size") if file.is_file() else None
    return side * LATENT_FACTOR if isinstance(side, int) else 512


def _report_lines(
    report: SetReport, options: CheckOptions, token_limit: int | None
) -> Iterator[str]:
    num_read = len(report.caption_words)
    repeats = (
        "" if report.num_samples == report.num_pairs else f" ({report.num_samples} with repeats)"
    )
    yield f"{report.num_pairs} pairs{repeats}, {num_read} of them readable"
    if report.num_without_mask:
        yield (
            f"{report.num_without_mask} without a mask: all of the image counts as the subject, and its background will leak "
            "into the results"
        )
    yield "sizes of the targets (width x height):"
    for (height, width), count in islice(report.sizes.items(), MAX_LISTED):
        yield f"  {count:>8}  {width} x {height}"
    if len(report.sizes) > MAX_LISTED:
        rest = sum(islice(report.sizes.values(), MAX_LISTED, None))
        yield f"  {rest:>8}  of {len(report.sizes) - MAX_LISTED} further sizes"
    yield from _target_lines(report, options)
    yield from _caption_lines(report, token_limit)
    for kind, messages in report.problems.items():
        yield f"{kind} ({len(messages)}):"
        yield from _listed(messages)
    yield "problems found" if report.problems else "no problems"


def _listed(texts: Sequence[str]) -> Iterator[str]:
    yield from (f"  {text}" for text in texts[:MAX_LISTED])
    if len(texts) > MAX_LISTED:
        yield f"  and {len(texts) - MAX_LISTED} more"


def _target_lines(report: SetReport, options: CheckOptions) -> Iterator[str]:
    if report.num_enlarged:
        least = "that of their bucket" if options.buckets else options.resolution
        yield f"{report.num_enlarged} have a side below {least} and may be enlarged"
    if report.num_cropped:
        cure = (
            "crop them by hand" if options.buckets else "crop them by hand, or train with buckets"
        )
        yield f"{report.num_cropped} lose more than half of their subject to the crop: {cure}"
    if report.num_transparent:
        yield (
            f"{report.num_transparent} are partly transparent: what is hidden there is their background in training; "
            "put them on a background"
        )


def _caption_lines(report: SetReport, token_limit: int | None) -> Iterator[str]:
    tokens = report.caption_tokens or {}
    for unit, lengths in (("words", report.caption_words), ("tokens", tuple(tokens.values()))):
        if lengths:
            middle = statistics.median_low(lengths)
            yield f"captions: {min(lengths)} to {max(lengths)} {unit}, median {middle}"
    long = [key for key, length in tokens.items() if length > (token_limit or 0)]
    if long:
        yield f"captions of more than {token_limit} tokens, whose rest the text encoder cuts off: {len(long)}"
        yield from _listed(long)
