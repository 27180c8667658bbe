"""``dreamcache dataset shard``: a training set as WebDataset shards, which appear when all of them are whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import check_range
from ..errors import DreamCacheError, InputError
from ..files.whole_files import whole_file
from ..images.files import encode_png
from ..packages import require
from .sources.reading import located
from .sources.shards import UNFINISHED
from .sources.source import PairSource


def write_shards(
    source: PairSource,
    folder: str | os.PathLike[str],
    *,
    max_count: int = 1000,
    has_bar: bool = False,
) -> list[Path]:
    """Write a set as shards; after an interruption, those that were whole are kept.

    Args:
        source: The set. Pairs without a mask whose target is their own subject get a mask of ones.
        folder: Where to; empty, new, or interrupted before.
        max_count: Most pairs to a shard.
        has_bar: Whether to show a progress bar.

    Returns:
        The shards, ``shard-000000.tar`` and so on.

    Raises:
        InputError: The folder holds something else, ``max_count`` is below 1, or a pair cannot be read.
        MissingPackageError: webdataset is not installed.
    """
    folder = Path(folder)
    check_range("max_count", max_count, 1)
    if folder.exists() and not (folder.is_dir() and set(os.listdir(folder)) <= {UNFINISHED}):
        raise InputError(
            f"Expected an empty or new folder to write shards to; {folder} holds something. Give another one."
        )
    require_webdataset()
    unfinished = folder / UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    indices = range(len(source.keys))
    written: list[Path] = []
    with tqdm(total=len(indices), unit="pair", desc="packing", disable=not has_bar) as bar:
        for start in indices[::max_count]:
            part = indices[start : start + max_count]
            path = unfinished / f"{_digest(source, part)}.tar"
            if not path.exists():
                write_tar(path, (_sample(source, index) for index in part))
            bar.update(len(part))
            written.append(path)
    for stale in set(unfinished.iterdir()) - set(written):
        stale.unlink()
    shards = [folder / f"shard-{number:06d}.tar" for number in range(len(written))]
    for path, shard in zip(written, shards, strict=True):
        path.rename(shard)
    unfinished.rmdir()
    return shards


def write_tar(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write a shard, all or nothing.

    Args:
        path: The shard.
        samples: Contents by ending (``mask.png``), and the name under ``__key__``.
    """
    TarWriter = require_webdataset().TarWriter
    with (
        whole_file(path) as temporary,
        temporary.open("wb") as stream,
        TarWriter(stream, mtime=0) as writer,
    ):
        for sample in samples:
            writer.write(sample)


def require_webdataset() -> Any:
    """Import webdataset.

    Raises:
        MissingPackageError: It is not installed.
    """
    with require("webdataset", "train"):
        import webdataset
    return webdataset


def _digest(source: PairSource, indices: range) -> str:
    """Identify what a shard holds by its pairs' numbers, names and stamps."""
    texts = "\n".join(f"{i}\n{source.keys[i]}\n{source.stamp(i)}" for i in indices)
    return hashlib.sha256(texts.encode("utf-8", "surrogateescape")).hexdigest()


def _sample(source: PairSource, index: int) -> dict[str, Any]:
    try:
        pair = source.read(index)
    except DreamCacheError as error:
        text = f"{error} Mend or remove it, and give the command again: whole shards are kept."
        raise InputError(located(source, index, text)) from error
    sample: dict[str, Any] = {
        "__key__": f"{index:08d}",
        "generation.png": encode_png(pair.target),
        "caption.txt": pair.caption,
    }
    is_own_subject = pair.subject is pair.target
    if not is_own_subject:
        sample["subject.png"] = encode_png(pair.subject)
    if pair.mask is not None or is_own_subject:
        mask = pair.target.new_ones(pair.target.shape[:3]) if pair.mask is None else pair.mask
        sample["mask.png"] = encode_png(mask)
    return sample
