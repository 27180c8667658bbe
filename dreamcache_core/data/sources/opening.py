"""Open a training set, whichever of the known forms it has."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import DreamCacheError, InputError
from ...files.walking import walk_folders
from ...images.files import is_image_name
from ...names import printable
from . import manifest
from .captioned import CaptionedSource
from .folder import FolderSource, is_part_name, tells_pairs
from .manifest import ManifestSource
from .shards import ShardSource, shard_files
from .source import PairSource
from .subjects200k import Subjects200KSource, parquet_files

logger = logging.getLogger(__name__)

METADATA = "metadata"
"""Name of ImageFolder's list, without its ending."""

SETS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".parquet")
"""Endings of files that hold pairs, whether they are read or not."""

FORMS = (
    "a folder, of any depth, of images with captions: X.png with X.txt or X.caption and, if there are, X-masklabel.png or "
    "masks/X.png; or X_generation.png, X_mask.png and X_caption.txt for every pair; or with metadata.jsonl or metadata.csv; "
    "a manifest (.jsonl or .csv) with image, caption and, if there are, mask and subject; "
    "WebDataset shards (a .tar file or a folder of them) with KEY.generation.png, KEY.mask.png and KEY.caption.txt; "
    "Subjects200K (a .parquet file or the folder of them)"
)


def open_source(path: str | os.PathLike[str], caption: str | None = None) -> PairSource:
    """Open a set. In a folder, shards count before parquet files, and these before single images.

    Shards or parquet files that hold no pair are passed over for images beside them, with a warning. Of two layouts in one
    folder the first of these is read, with a warning: ``metadata.jsonl`` or ``.csv``, the authors', images with captions.

    Args:
        path: File or folder.
        caption: Caption of images that have none, in a folder of images with captions.

    Raises:
        InputError: It has none of the known forms, or no complete pair.
        FileFormatError: It has one, but cannot be read.
        MissingPackageError: It needs an optional package.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, caption)
    suffix = path.suffix.lower() if path.is_file() else ""
    if suffix in manifest.SUFFIXES:
        return ManifestSource(path)
    if suffix == ".tar":
        return ShardSource(path)
    if suffix == ".parquet":
        return Subjects200KSource(path)
    found = "a file of another kind" if path.exists() else "not there"
    raise InputError(f"{path} is {found}. Expected a training set: {FORMS}.")


def refuse_within(out: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Refuse to write images into a set, of which they would become part.

    Raises:
        InputError: ``path`` is a folder, and ``out`` lies in it or is it.
    """
    if Path(path).is_dir() and Path(out).resolve().is_relative_to(Path(path).resolve()):
        raise InputError(
            f"Expected --out to be outside of the set {path}, where images that are written become part of it; given {out}. "
            "Give another."
        )


def _open_folder(path: Path, caption: str | None) -> PairSource:
    if read := shard_files(path):
        form, name = ShardSource, "tar files"
    elif read := parquet_files(path):
        form, name = Subjects200KSource, "parquet files"
    else:
        try:
            return _open_images(path, caption)
        except InputError as error:
            raise InputError(f"{error} A training set is {FORMS}.") from error
    try:
        source = form(path)
    except DreamCacheError as error:  # perhaps they lie there by chance
        try:
            source = _open_images(path, caption)
        except InputError:
            raise error from None
        logger.warning("%s: its images are read, its %s are not: %s", path, name, error)
    else:
        others = [
            file
            for folder, files in walk_folders(str(path))
            for file in files
            if (is_part_name(file) or file.lower().endswith(SETS))
            and not file.startswith(".")
            and path / folder / file not in read
        ]
        _name_rest(
            source,
            f"{path}: its {name} are read",
            others,
            "Give their folders one by one, and unpack what is compressed.",
        )
    return source


def _open_images(path: Path, caption: str | None) -> PairSource:
    """Open a folder of images by what lies beside them."""
    listed = [path / f"{METADATA}{suffix}" for suffix in manifest.SUFFIXES]
    if lists := [file for file in listed if file.is_file()]:
        if len(lists) > 1:
            logger.warning("%s: %s is read, %s is not.", path, *(file.name for file in lists))
        source = ManifestSource(lists[0])
        listed = {os.path.normpath(f) for i in range(len(source.keys)) for f in source.files(i)}
        images = [
            os.path.join(folder, name)
            for folder, files in walk_folders(str(path))
            for name in files
            if is_image_name(name)
        ]
        _name_rest(
            source,
            f"{path}: what {lists[0].name} lists is read",
            [image for image in images if os.path.normpath(path / image) not in listed],
            "List them too.",
        )
        return source
    names = [name for _, files in walk_folders(str(path)) for name in files]
    if not any(map(tells_pairs, names)):
        return CaptionedSource(path, caption)
    source = FolderSource(path)
    _name_rest(
        source,
        f"{path}: pairs of X_generation, X_mask and X_caption are read",
        [name for name in names if is_image_name(name) and not is_part_name(name)],
        "Move them out: one set is of one layout.",
    )
    return source


def _name_rest(source: Any, read: str, others: Sequence[str], cure: str) -> None:
    """Name files that are not read, if there are any, in the log and among the set's problems."""
    if others:
        rest = f"{read}; {len(others)} other files are not ({printable(', '.join(others[:3]))}). {cure}"
        logger.warning("%s", rest)
        source.problems = (*source.problems, rest)
