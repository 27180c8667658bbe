"""The authors' layout: folders with ``X_generation.png``, ``X_mask.png`` and ``X_caption.txt``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from ...files.texts import MAX_CAPTION_BYTES, read_text
from ...files.walking import walk_folders
from ...names import printable
from .reading import (
    FileSource,
    NamedFile,
    Part,
    one_line,
    require_pairs,
    stamp_files,
)

PARTS = ("generation", "mask", "caption")
_MEMBER = re.compile(
    r"(?P<stem>.*)_(?:(?P<image>generation|mask)\.(?:png|jpe?g|webp|avif|bmp|gif|jp2|tiff?)|(?P<text>caption)\.txt)",
    re.IGNORECASE | re.DOTALL,
)


class _Files(NamedTuple):
    folder: str
    generation: str
    mask: str
    caption: str

    def path(self, part: str) -> str:
        return os.path.join(self.folder, getattr(self, part))


class FolderSource(FileSource):
    """Pairs in folders of any depth, in the order of their names; no file is opened until a pair is read.

    Files and folders whose names begin with a dot are passed over. Images may be of any kind that is read.

    Args:
        folder: The folder.

    Attributes:
        keys: Path of every pair below the folder, without ``_generation.png``, with forward slashes.
        problems: What was left out as incomplete, and why.

    Raises:
        InputError: There is no such folder, or no complete pair in it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.root = Path(folder)
        if not self.root.is_dir():
            raise InputError(f"Expected a folder of pairs, got {folder}, which is none.")
        problems: list[str] = []
        found = sorted(_scan(self.root, problems))
        self.keys = tuple(key for key, _ in found)
        self._pairs = tuple(files for _, files in found)
        self.problems = require_pairs(self.root, len(found), sorted(problems))

    def files(self, index: int) -> tuple[str, ...]:
        """Paths of image, mask and caption."""
        return tuple(self._pairs[index].path(part) for part in PARTS)

    def stamp(self, index: int) -> str:
        """Names, sizes and times of the files of a pair."""
        return stamp_files(self.root, self.files(index))

    def image(self, index: int, part: Part) -> NamedFile | None:
        """Find an image of a pair; the target is its own subject."""
        if part == "subject":
            return None
        return self._pairs[index].path("generation" if part == "target" else part), None

    def caption(self, index: int) -> str:
        """Caption of a pair."""
        return one_line(read_text(self._pairs[index].path("caption"), MAX_CAPTION_BYTES))


def _scan(root: Path, problems: list[str]) -> Iterator[tuple[str, _Files]]:
    """Yield key and files of every complete pair; note the others."""

    def note(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be opened: {error.strerror}.")

    for below, names in walk_folders(str(root), note=note):
        folder = os.path.join(root, below)
        prefix = f"{below.replace(os.sep, '/')}/" if below else ""
        for stem, parts in _by_stem(names).items():
            key = printable(prefix + stem)
            doubt = _incomplete(parts)
            if doubt:
                problems.append(f"{key}: {doubt}")
            else:
                yield key, _Files(folder, *(parts[part][0] for part in PARTS))


def is_part_name(name: str) -> bool:
    """Whether a file, by its name, is a part of a pair."""
    return not name.startswith(".") and _MEMBER.fullmatch(name) is not None


def tells_pairs(name: str) -> bool:
    """Whether a file, by its name, tells that its folder holds pairs; ``x_mask.png`` may be the mask of ``x.png``."""
    match = _MEMBER.fullmatch(name)
    return is_part_name(name) and match is not None and (match["image"] or "").lower() != "mask"


def _by_stem(names: list[str]) -> dict[str, dict[str, list[str]]]:
    """Group the files of one folder: stem to part to names."""
    stems: dict[str, dict[str, list[str]]] = {}
    for name in names:
        match = _MEMBER.fullmatch(name)
        if match and not name.startswith("."):
            part = (match["image"] or match["text"]).lower()
            stems.setdefault(match["stem"], {}).setdefault(part, []).append(name)
    return stems


def _incomplete(parts: dict[str, list[str]]) -> str:
    """Say what is wrong with the files of one stem, if anything."""
    missing = [part for part in PARTS if part not in parts]
    if missing:
        there = ", ".join(name for names in parts.values() for name in names)
        wanted = " and ".join(
            f"_{part}.{'txt' if part == 'caption' else 'png'}" for part in missing
        )
        return f"there is {there}, but no {wanted}; add it."
    doubles = [" and ".join(sorted(names)) for names in parts.values() if len(names) > 1]
    return f"{doubles[0]} are two files for one part; remove one." if doubles else ""
