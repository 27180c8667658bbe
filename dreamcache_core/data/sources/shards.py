"""WebDataset shards: tar files with ``KEY.generation.png``, ``KEY.mask.png`` and ``KEY.caption.txt``."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ...errors import FileFormatError, InputError
from ...names import printable
from .reading import (
    FileSource,
    NamedFile,
    Part,
    decode_text,
    one_line,
    require_pairs,
    stamp_files,
)

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


class ShardSource(FileSource):
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
                    images = parts["generation"], parts.get("mask"), parts.get("subject")
                    entries.append(_Entry(shard, *images, parts["caption"]))
        self.keys = tuple(keys)
        self._entries = tuple(entries)
        self.problems = require_pairs(self.path, len(keys), problems)

    def files(self, index: int) -> tuple[str, ...]:
        """Shard and member of every part, as ``SHARD:MEMBER``."""
        entry = self._entries[index]
        return tuple(_name(entry, member) for member in entry[1:] if member is not None)

    def stamp(self, index: int) -> str:
        """Name, size and time of the shard of a pair, and where in it its members are."""
        entry = self._entries[index]
        places = [f"{member.offset}+{member.size}" for member in entry[1:] if member is not None]
        return f"{stamp_files(entry.shard.parent, [str(entry.shard)])}; {', '.join(places)}"

    def image(self, index: int, part: Part) -> NamedFile | None:
        """Read an image of a pair."""
        entry = self._entries[index]
        member = entry.generation if part == "target" else getattr(entry, part)
        return None if member is None else _contents(entry, member)

    def caption(self, index: int) -> str:
        """Caption of a pair."""
        entry = self._entries[index]
        return one_line(decode_text(*_contents(entry, entry.caption)))


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
