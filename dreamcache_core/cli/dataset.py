"""``dreamcache dataset build | check | encode | shard``."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.augmentation import Alterations
from ..data.checking import SetReport, check_source, load_token_counter, training_sheet
from ..data.sources.opening import FORMS, open_source
from ..data.sources.shards import write_shards
from ..errors import InputError
from ..images.files import save_png
from . import dataset_build as dataset_build_cli
from .flags import parse_config

MAX_LISTED = 10
"""Problems of a kind, and image sizes, that are listed; the rest is counted."""


def add_dataset_commands(commands: Any) -> None:
    """Add ``dataset`` and what follows it.

    Args:
        commands: The sub-parsers of the program.
    """
    text = "Build, check, precompute or pack a training set."
    parser = commands.add_parser("dataset", help=text, description=text)
    inner = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_check(inner)
    _add_shard(inner)
    # the flags of these are the fields of a configuration, which has a parser of its own
    for name, run, text in (
        ("build", dataset_build_cli.run, "Make a synthetic set: captions, images, masks."),
        ("encode", _encode, "Run VAE and text encoders over a set once."),
    ):
        inner.add_parser(name, help=text, add_help=False).set_defaults(run=run, takes_rest=True)


def _encode(argv: Sequence[str]) -> None:
    from ..data.precomputed.encoding import EncodeOptions, encode_dataset

    print(encode_dataset(parse_config(EncodeOptions, argv, program="dreamcache dataset encode")))


def _command(
    commands: Any, name: str, run: Callable[[Any], None], help: str, description: str
) -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser(
        name, help=help, description=description, formatter_class=formatter
    )
    parser.set_defaults(run=run, takes_rest=False)
    return parser


# --- check


def _add_check(commands: Any) -> None:
    text = "Read a training set and say what is in it and what is wrong with it."
    codes = "Exit code: 0 all is well, 1 there are problems, 2 it is no training set."
    add = _command(commands, "check", _check, text, f"{text} {codes}").add_argument
    add("path", metavar="PATH", help=FORMS)
    add("--size", type=int, default=512, help="side of the images in training, pixels")
    add("--buckets", action="store_true", help="training keeps the aspect of targets, as buckets")
    for name, change in (
        ("flip", "mirrors"),
        ("jitter", "recolours"),
        ("erase", "erases parts of"),
    ):
        text = f"training never {change} references"
        add(f"--no_reference_{name}", dest=name, action="store_false", help=text)
    add("--out", default="check.png", help="PNG of targets and references to write")
    add("--samples", type=int, default=8, help="pairs in that image; 0: no image")
    add("--tokenizer", help="folder of a tokenizer or diffusers model: captions in tokens as well")


def _check(args: argparse.Namespace) -> None:
    _check_options(args)
    count, limit = load_token_counter(args.tokenizer) if args.tokenizer else (None, None)
    source = open_source(args.path)
    seen: Any = {"resolution": args.size, "has_buckets": args.buckets}
    report = check_source(source, **seen, count_tokens=count, has_bar=True)
    for line in _report_lines(report, args, limit):
        print(line)
    alterations = Alterations(args.flip, args.jitter, args.erase)
    sheet = training_sheet(source, **seen, num_samples=args.samples, alterations=alterations)
    if sheet is not None:
        save_png(args.out, sheet)
        print(f"targets and references as training sees them: {args.out}")
    if report.problems:
        raise SystemExit(1)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse, before the set is read, what would fail afterwards."""
    if args.size % 8 or not 64 <= args.size <= 2048:
        raise InputError(f"--size must be a multiple of 8 in 64 ... 2048; given {args.size}.")
    if args.samples < 0:
        raise InputError(f"--samples must be at least 0; given {args.samples}.")
    out = Path(args.out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"--out must be a file ending in .png; given {out}.")
    if not out.parent.is_dir():
        raise InputError(f"There is no folder {out.parent}. Create it, or change --out.")


def _report_lines(
    report: SetReport, args: argparse.Namespace, token_limit: int | None
) -> Iterator[str]:
    num_read = len(report.caption_words)
    yield f"{report.num_pairs} pairs, {num_read} of them readable"
    if report.num_without_mask:
        yield f"{report.num_without_mask} without a mask: the whole image is the reference"
    yield "sizes of the targets (width x height):"
    for (height, width), count in islice(report.sizes.items(), MAX_LISTED):
        yield f"  {count:>8}  {width} x {height}"
    if len(report.sizes) > MAX_LISTED:
        rest = sum(islice(report.sizes.values(), MAX_LISTED, None))
        yield f"  {rest:>8}  of {len(report.sizes) - MAX_LISTED} further sizes"
    yield from _target_lines(report, args)
    yield from _caption_lines(report, token_limit)
    for kind, messages in report.problems.items():
        yield f"{len(messages)} {kind}:"
        yield from (f"  {message}" for message in messages[:MAX_LISTED])
        if len(messages) > MAX_LISTED:
            yield f"  and {len(messages) - MAX_LISTED} more"
    yield "problems found" if report.problems else "no problems"


def _target_lines(report: SetReport, args: argparse.Namespace) -> Iterator[str]:
    if report.num_enlarged:
        least = "that of their bucket" if args.buckets else args.size
        yield f"{report.num_enlarged} have a side below {least} and may be enlarged"
    if report.num_cropped:
        cure = "crop them by hand" if args.buckets else "crop them by hand, or train with buckets"
        yield f"{report.num_cropped} lose more than half of their subject to the crop: {cure}"
    if report.num_transparent:
        yield (
            f"{report.num_transparent} are partly transparent: what is hidden there is their background in training; "
            "put them on a background"
        )


def _caption_lines(report: SetReport, token_limit: int | None) -> Iterator[str]:
    for unit, lengths in (("words", report.caption_words), ("tokens", report.caption_tokens)):
        if lengths:
            middle = statistics.median_low(lengths)
            yield f"captions: {min(lengths)} to {max(lengths)} {unit}, median {middle}"
    num_long = sum(length > (token_limit or 0) for length in report.caption_tokens or ())
    if num_long:
        yield f"{num_long} captions exceed {token_limit} tokens; the text encoder cuts off the rest"


# --- shard


def _add_shard(commands: Any) -> None:
    text = "Pack a training set into WebDataset shards."
    add = _command(commands, "shard", _shard, text, text).add_argument
    add("path", metavar="PATH", help=FORMS)
    add("out", metavar="OUT", help="folder for the shards, empty or new")
    add("--max-count", type=int, default=1000, help="most pairs to a shard")


def _shard(args: argparse.Namespace) -> None:
    source = open_source(args.path)
    shards = write_shards(source, args.out, max_count=args.max_count, has_bar=True)
    print(f"{len(source.keys)} pairs in {len(shards)} shards: {args.out}")
