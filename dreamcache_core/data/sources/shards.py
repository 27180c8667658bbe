"""WebDataset shards: tar files with ``KEY.generation.png``, ``KEY.mask.png`` and ``KEY.caption.txt``."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ...errors import DreamCacheError, FileFormatError, InputError
from ...files.whole_files import whole_file
from ...images.files import encode_png, read_image, read_mask
from ..synthetic.folder import require_webdataset
from . import reading
from .reading import decode_caption, image_size, make_pair, printable, settle
from .source import Pair, PairSource

UNFINISHED = ".unfinished-shards"
"""Folder in the set in which its shards lie, each by a digest of what it holds, until the last one is written."""

PARTS = ("generation", "mask", "subject", "caption")
_ENDINGS = {"caption.txt": "caption"} | {
    f"{part}.{kind}": part for part in PARTS[:3] for kind in ("png", "jpg", "jpeg", "webp")
}


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


class _Entry(NamedTuple):
    shard: Path
    generation: _Member
    mask: _Member | None
    subject: _Member | None
    caption: _Member


class ShardSource:
    """Pairs in tar files, with random access: the tars are indexed once, then read by seeking.

    ``KEY.subject.png`` is optional: another image of the subject, to which the mask then belongs, if there is one;
    without it the target is its own subject and the mask is needed.

    Args:
        path: One shard, or the folder that holds them; not compressed.

    Attributes:
        keys: ``SHARD/KEY`` for every pair; shards by name, pairs in their order.
        problems: What was left out as incomplete, and why.

    Raises:
        InputError: There are no shards, or no complete pair.
        FileFormatError: A file is no tar, or is compressed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        problems: list[str] = []
        keys: list[str] = []
        entries: list[_Entry] = []
        for shard in shard_files(self.path):
            for key, parts in _index(shard, problems).items():
                doubt = _incomplete(parts)
                if doubt:
                    problems.append(f"{shard.name}: {key} {doubt}")
                else:
                    keys.append(printable(f"{shard.stem}/{key}"))
                    entries.append(_entry(shard, parts))
        self.keys = tuple(keys)
        self._entries = tuple(entries)
        self.problems = settle(self.path, len(keys), problems)

    def files(self, index: int) -> tuple[str, ...]:
        """Shard and member of every part, as ``SHARD:MEMBER``."""
        entry = self._entries[index]
        return tuple(_name(entry, member) for member in entry[1:] if member is not None)

    def stamp(self, index: int) -> str:
        """Name, size and time of the shard of a pair, and where in it its members are."""
        entry = self._entries[index]
        places = [f"{member.offset}+{member.size}" for member in entry[1:] if member is not None]
        return f"{reading.stamp_files(entry.shard.parent, [str(entry.shard)])}; {', '.join(places)}"

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the target, pixels, from its header."""
        entry = self._entries[index]
        return image_size(*_contents(entry, entry.generation))

    def caption(self, index: int) -> str:
        """Caption of a pair."""
        entry = self._entries[index]
        return decode_caption(*_contents(entry, entry.caption))

    def read(self, index: int) -> Pair:
        """Read a pair."""
        entry = self._entries[index]
        target, alpha = read_image(*_contents(entry, entry.generation))
        subject, mask, has_hidden_pixels = target, None, alpha is not None
        if entry.subject is not None:
            subject, alpha = read_image(*_contents(entry, entry.subject))
        if entry.mask is not None:
            mask = read_mask(*_contents(entry, entry.mask))
        name = _name(entry, entry.mask or entry.subject or entry.generation)
        return make_pair(
            target,
            subject,
            alpha,
            mask,
            self.caption(index),
            name=name,
            has_hidden_pixels=has_hidden_pixels,
        )


def shard_files(path: Path) -> list[Path]:
    """Return the shards of a set in order: a tar file itself, or those directly in a folder, hidden ones apart.

    Raises:
        InputError: They were not all written.
    """
    if path.is_file():
        return [path]
    if (path / UNFINISHED).is_dir():
        raise InputError(
            f"Expected finished shards in {path}; writing them was interrupted. Give the command 'dataset shard' again."
        )
    return sorted(shard for shard in path.glob("*.tar") if not shard.name.startswith("."))


def write_shards(
    source: PairSource,
    folder: str | os.PathLike[str],
    *,
    max_count: int = 1000,
    has_bar: bool = False,
) -> list[Path]:
    """Write a set as shards (``dreamcache dataset shard``); after an interruption, those that were whole are kept.

    Args:
        source: The set. Pairs without a mask whose target is their own subject get a mask of ones.
        folder: Where to; empty, new, or interrupted before.
        max_count: Most pairs to a shard.
        has_bar: Whether to show a progress bar.

    Returns:
        The shards, ``shard-000000.tar`` and so on. They appear when all of them are whole.

    Raises:
        InputError: The folder holds something else, ``max_count`` is below 1, or a pair cannot be read.
        MissingPackageError: webdataset is not installed.
    """
    folder = Path(folder)
    if max_count < 1:
        raise InputError(f"Expected at least 1 pair to a shard, got {max_count}. Use 1000.")
    if folder.exists() and not (folder.is_dir() and set(os.listdir(folder)) <= {UNFINISHED}):
        raise InputError(
            f"Expected an empty or new folder to write shards to; {folder} holds something. Give another one."
        )
    TarWriter = require_webdataset().TarWriter
    unfinished = folder / UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    indices = range(len(source.keys))
    with tqdm(total=len(indices), unit="pair", desc="packing", disable=not has_bar) as bar:
        written = [
            _write_shard(unfinished, source, indices[start : start + max_count], TarWriter, bar)
            for start in indices[::max_count]
        ]
    return _finish(folder, written)


def _write_shard(
    folder: Path, source: PairSource, indices: range, TarWriter: Any, bar: Any
) -> Path:
    """Write a shard, unless it is there."""
    path = folder / f"{_digest(source, indices)}.tar"
    if path.exists():
        bar.update(len(indices))
        return path
    with (
        whole_file(path) as temporary,
        temporary.open("wb") as stream,
        TarWriter(stream, mtime=0) as writer,
    ):
        for index in indices:
            writer.write({"__key__": f"{index:08d}", **_encode(_read(source, index))})
            bar.update()
    return path


def _digest(source: PairSource, indices: range) -> str:
    """Identify what a shard holds by its pairs' numbers, names and stamps."""
    texts = "\n".join(f"{i}\n{source.keys[i]}\n{source.stamp(i)}" for i in indices)
    return hashlib.sha256(texts.encode("utf-8", "surrogateescape")).hexdigest()


def _read(source: PairSource, index: int) -> Pair:
    try:
        return source.read(index)
    except DreamCacheError as error:
        text = f"{error} Mend or remove it, and give the command again: whole shards are kept."
        raise InputError(reading.located(source, index, text)) from error


def _finish(folder: Path, written: Sequence[Path]) -> list[Path]:
    """Let the shards appear; what else an interruption left is deleted."""
    for stale in set((folder / UNFINISHED).iterdir()) - set(written):
        stale.unlink()
    shards = [folder / f"shard-{number:06d}.tar" for number in range(len(written))]
    for path, shard in zip(written, shards, strict=True):
        path.rename(shard)
    (folder / UNFINISHED).rmdir()
    return shards


def _index(shard: Path, problems: list[str]) -> dict[str, dict[str, _Member]]:
    """Find the members of a shard: key to part to member."""
    keys: dict[str, dict[str, _Member]] = {}
    try:
        # "r:" refuses compressed files: there is no seeking in them
        with tarfile.open(shard, "r:") as tar:
            try:
                end = shard.stat().st_size
                for info in tar:
                    if info.offset_data + info.size <= end:
                        _add(keys, info)
            except (tarfile.TarError, OSError) as error:
                problems.append(f"{shard.name} is cut short or damaged ({error}); fetch it again.")
    except (tarfile.TarError, OSError) as error:
        raise FileFormatError(
            f"Expected an uncompressed tar file, got {shard}: {error}. Unpack or fetch it again."
        ) from error
    return keys


def _add(keys: dict[str, dict[str, _Member]], info: tarfile.TarInfo) -> None:
    folder, slash, name = info.name.rpartition("/")
    stem, _, ending = name.partition(".")
    part = _ENDINGS.get(ending.lower())
    if part is not None and info.isreg() and not info.issparse():
        member = _Member(info.name, info.offset_data, info.size)
        keys.setdefault(f"{folder}{slash}{stem}", {})[part] = member


def _entry(shard: Path, parts: Mapping[str, _Member]) -> _Entry:
    return _Entry(
        shard, parts["generation"], parts.get("mask"), parts.get("subject"), parts["caption"]
    )


def _incomplete(parts: Mapping[str, _Member]) -> str:
    """Say what is missing of a pair, if anything."""
    missing = [part for part in ("generation", "caption") if part not in parts]
    if "mask" not in parts and "subject" not in parts:
        missing.append("mask")
    return f"has no {' and no '.join(missing)}; add it." if missing else ""


def _name(entry: _Entry, member: _Member) -> str:
    return f"{entry.shard}:{member.name}"


def _contents(entry: _Entry, member: _Member) -> tuple[bytes, str]:
    """Read a member -> its bytes, and its name for messages."""
    name = _name(entry, member)
    try:
        with entry.shard.open("rb") as stream:
            stream.seek(member.offset)
            return stream.read(member.size), name
    except OSError as error:
        raise FileFormatError(
            f"Expected to read {name}: {error.strerror}. Check the shard's place and permissions."
        ) from error


def _encode(pair: Pair) -> dict[str, Any]:
    """Return the members of a pair by ending."""
    members: dict[str, Any] = {
        "generation.png": encode_png(pair.target),
        "caption.txt": pair.caption,
    }
    is_own_subject = pair.subject is pair.target
    if not is_own_subject:
        members["subject.png"] = encode_png(pair.subject)
    if pair.mask is not None or is_own_subject:
        mask = pair.target.new_ones(pair.target.shape[:3]) if pair.mask is None else pair.mask
        members["mask.png"] = encode_png(mask)
    return members
