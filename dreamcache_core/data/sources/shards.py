"""WebDataset shards: tar files with ``KEY.generation.png``, ``KEY.mask.png`` and ``KEY.caption.txt``."""

from __future__ import annotations

import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FileFormatError, InputError
from ...files.texts import MAX_CAPTION_BYTES, decode_text
from ...names import printable
from .reading import (
    FileSource,
    NamedFile,
    Part,
    one_line,
    require_pairs,
    stamp_files,
)

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished-shards"
"""Folder in the set in which its shards lie, each by a digest of what it holds, until the last one is written."""

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp", "avif", "bmp", "gif", "jp2", "tif", "tiff")
PARTS = ("generation", "mask", "subject", "caption")
_ENDINGS = {"caption.txt": "caption"} | {
    f"{part}.{kind}": part for part in PARTS[:3] for kind in IMAGE_ENDINGS
}


_TAR_ERRORS = (
    *(tarfile.TarError, ValueError, OverflowError, EOFError),
    *(IndexError, RecursionError),
)
"""What tarfile raises, of headers with nonsense also the latter."""


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
        unread: Counter[str] = Counter()
        for shard in shard_files(self.path):
            for key, parts in _index(shard, problems, unread).items():
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
        if unread:
            logger.warning(
                "%s: not read: %s. A pair is KEY.generation.png, KEY.mask.png and KEY.caption.txt.",
                self.path,
                printable(
                    ", ".join(f"{count} .{ending}" for ending, count in sorted(unread.items()))
                ),
            )

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
        size = entry.caption.size
        if size > MAX_CAPTION_BYTES:
            raise FileFormatError(
                f"Expected at most {MAX_CAPTION_BYTES} bytes of text in {_name(entry, entry.caption)}, got {size}. Is it "
                "another file?"
            )
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


def _index(shard: Path, problems: list[str], unread: Counter[str]) -> dict[str, dict[str, _Member]]:
    """Find the members of a shard: key to part to member; count the others by their endings."""
    keys: dict[str, dict[str, _Member]] = {}
    try:
        # "r:" refuses compressed files: there is no seeking in them
        with tarfile.open(shard, "r:") as tar:
            try:
                end = shard.stat().st_size
                for info in tar:
                    if 0 <= info.size <= end - info.offset_data:
                        doubts = _add(keys, info, unread)
                        problems += (f"{shard.name}: {doubt}" for doubt in doubts)
                if not _ends_at(tar):
                    problems.append(
                        f"{shard.name} is cut short, damaged, or several tar files in one, at byte {tar.offset}: what "
                        "follows is not read; write it again."
                    )
            except (*_TAR_ERRORS, OSError) as error:
                problems.append(f"{shard.name} is cut short or damaged ({error}); fetch it again.")
    except (*_TAR_ERRORS, OSError) as error:
        raise FileFormatError(
            f"Expected an uncompressed tar file, got {shard}: {error}. Unpack or fetch it again."
        ) from error
    return keys


def _add(
    keys: dict[str, dict[str, _Member]], info: tarfile.TarInfo, unread: Counter[str]
) -> Iterator[str]:
    """Take in a member, if it is a part of a pair, else count its ending; yield what is wrong with it."""
    folder, slash, name = info.name.rpartition("/")
    stem, ending = _split(name)
    part = _ENDINGS.get(ending)
    if name.startswith("."):
        return
    if part is None:
        unread.update([ending] if info.isreg() else [])
        return
    parts = keys.setdefault(f"{folder}{slash}{stem}", {})
    if not info.isreg() or info.issparse():
        yield f"{info.name} is a link or has holes; store the file itself."
    elif part in parts:
        yield f"{info.name} is there twice, and one of them is not read; give each pair a name of its own."
    else:
        parts[part] = _Member(info.name, info.offset_data, info.size)


def _split(name: str) -> tuple[str, str]:
    """Take a member's name apart -> key, and ending in lower case; a key may have dots."""
    stem, _, kind = name.rpartition(".")
    key, _, part = stem.rpartition(".")
    ending = f"{part}.{kind}".lower()
    return (key, ending) if ending in _ENDINGS else (stem, kind.lower())


def _ends_at(tar: tarfile.TarFile) -> bool:
    """Whether reading a tar file ended at its end mark: a block of zeros, and nothing but zeros after it."""
    stream: Any = tar.fileobj
    stream.seek(tar.offset)
    is_marked = False
    while block := stream.read(2**20):
        if block.strip(b"\0"):
            return False
        is_marked = True
    return is_marked


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
