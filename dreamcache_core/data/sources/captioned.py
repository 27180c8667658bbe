"""Folders as trainers of LoRAs have them: an image and, beside it, its caption and perhaps its mask."""

from __future__ import annotations

import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...errors import InputError
from ...files.texts import MAX_CAPTION_BYTES, read_text
from ...files.walking import walk_folders
from ...images.files import image_endings, read_image
from ...images.masks import on_white
from ...names import printable
from .folder import is_part_name
from .reading import FileSource, NamedFile, Part, one_line, require_pairs, stamp_files
from .source import Pair

logger = logging.getLogger(__name__)

MASKS = "masks"
"""Folder of masks with the names of their images; below the set's folder or beside the images."""

CAPTIONS = (".txt", ".caption")
_MASK_LABEL = re.compile(
    r"(?P<stem>.+)(?:(?P<kind>-masklabel)|[_.-]mask)", re.DOTALL | re.IGNORECASE
)
_CONDITION_LABEL = "-condlabel"
"""OneTrainer's images for ControlNets."""
_REPEATS = re.compile(r"(?P<times>[1-9]\d{0,2})_(?P<name>.+)", re.DOTALL)
"""Longer numbers are years: ``2019_holiday``."""


@dataclass(frozen=True)
class _Files:
    """Paths are full; without a caption file ``caption`` is the text itself."""

    image: str
    mask: str | None
    caption_file: str | None
    caption: str


class CaptionedSource(FileSource):
    """Images in folders of any depth, in the order of their names, each with its caption.

    The caption of ``x.png`` is in ``x.txt`` or ``x.caption``; without either, ``caption`` counts, else the name of a folder
    such as ``10_red bag`` (kohya), whose images also count that often, relative to other such folders. Its mask is
    ``x-masklabel.png`` (OneTrainer), ``x_mask.png`` without a caption of its own, or has the same name in a folder
    ``masks``. Without a mask an alpha channel serves; such a target is laid on white. Names that begin with a dot are
    passed over.

    Args:
        folder: The folder.
        caption: Caption of the images that have none.

    Attributes:
        keys: Path of every image below the folder, with forward slashes; ``#2`` and so on follow where it is repeated.
        problems: What was left out, and why.

    Raises:
        InputError: There is no such folder, or no image with a caption in it.
    """

    def __init__(self, folder: str | os.PathLike[str], caption: str | None = None) -> None:
        self.root = Path(folder)
        if not self.root.is_dir():
            raise InputError(f"Expected a folder of images, got {folder}, which is none.")
        problems: list[str] = []
        found: list[tuple[str, _Files, int]] = []
        unread: Counter[str] = Counter()

        def note(error: OSError) -> None:
            problems.append(f"{error.filename} cannot be opened: {error.strerror}.")

        in_masks: list[str] = []
        for below, names in walk_folders(str(self.root), note=note):
            if MASKS not in below.lower().split(os.sep):
                found += _images(self.root, below, names, caption, problems, unread)
            else:
                in_masks += (
                    os.path.join(self.root, below, name) for name in names if name[0] != "."
                )
        found.sort(key=lambda entry: entry[0])
        common = math.gcd(*(times for _, _, times in found))
        repeated = [
            (key if time == 0 else f"{key}#{time + 1}", files)
            for key, files, times in found
            for time in range(times // common)
        ]
        self.keys = tuple(printable(key) for key, _ in repeated)
        first: dict[str, int] = {}
        for index, (_, files) in enumerate(repeated):
            first.setdefault(files.image, index)
        self._distinct = tuple(first.values())
        self._pairs = tuple(files for _, files in repeated)
        self.problems = require_pairs(self.root, len(found), sorted(problems))
        _tell(self.root, [files for _, files, _ in found], unread, in_masks)

    @property
    def distinct(self) -> Sequence[int]:
        """First index of every image."""
        return self._distinct

    def files(self, index: int) -> tuple[str, ...]:
        """Paths of image, mask and caption, as far as there are any."""
        pair = self._pairs[index]
        return tuple(path for path in (pair.image, pair.mask, pair.caption_file) if path)

    def stamp(self, index: int) -> str:
        """Names, sizes and times of the files of a pair; a caption that stands in none."""
        return f"{self._pairs[index].caption}; {stamp_files(self.root, self.files(index))}"

    def image(self, index: int, part: Part) -> NamedFile | None:
        """Find an image of a pair; the target is its own subject."""
        if part == "subject":
            return None
        path = self._pairs[index].image if part == "target" else self._pairs[index].mask
        return (path, None) if path else None

    def new_mask(self, index: int) -> Path:
        """Where a mask made for an image belongs."""
        place = Path(self._pairs[index].image).relative_to(self.root)
        return self.root / MASKS / place.with_suffix(".png")

    def caption(self, index: int) -> str:
        """Caption of a pair."""
        pair = self._pairs[index]
        return one_line(
            read_text(pair.caption_file, MAX_CAPTION_BYTES) if pair.caption_file else pair.caption
        )

    def read(self, index: int) -> Pair:
        """Read a pair, a target with transparent parts on white."""
        pair = super().read(index)
        if not pair.has_hidden_pixels:
            return pair
        target, alpha = read_image(self._pairs[index].image)
        assert alpha is not None
        target = on_white(torch.cat([target, alpha[..., None]], dim=-1))
        return replace(pair, target=target, has_hidden_pixels=False)


def _images(
    root: Path,
    below: str,
    names: Sequence[str],
    caption: str | None,
    problems: list[str],
    unread: Counter[str],
) -> Iterator[tuple[str, _Files, int]]:
    """Yield key, files and repeats of the images of one folder; note what is incomplete, count what is not read."""
    folder = os.path.join(root, below)
    names = [name for name in names if not name.startswith(".")]
    by_stem = {ending: _by_stem(names, ending) for ending in (*CAPTIONS, None)}
    images, masks = by_stem.pop(None), _masks(root, below)
    labels = _labels(images, {stem for files in by_stem.values() for stem in files})
    marked = set(labels.values())
    conditions = {stem for stem in images if stem.lower().endswith(_CONDITION_LABEL)}
    named = _REPEATS.fullmatch(os.path.basename(os.path.abspath(folder)))
    times, default = (int(named["times"]), named["name"]) if named else (1, "")
    default = default if caption is None else caption
    read: set[str] = set()
    for stem in sorted(images.keys() - conditions):
        name, *others = images[stem]
        if name in marked or is_part_name(name):
            continue
        key = f"{below}/{name}".replace(os.sep, "/") if below else name
        read.update((name, *others))
        texts = [files[stem][0] for files in by_stem.values() if stem in files]
        label = labels.get(stem)
        read.update(texts, [label] if label else [])
        if others or len(texts) > 1:
            double = [name, *others] if others else texts
            problems.append(f"{key}: {' and '.join(double)} have one name; rename or remove one.")
        elif not (texts or default):
            problems.append(
                f"{key}: it has no caption; add {stem}.txt, or give caption, one text for all."
            )
        else:
            mask = os.path.join(folder, label) if label else masks.get(stem)
            text_file = os.path.join(folder, texts[0]) if texts else None
            image = os.path.join(folder, name)
            yield key, _Files(image, mask, text_file, "" if texts else default), times
    unread.update(
        os.path.splitext(name)[1].lower() or "without an ending" for name in set(names) - read
    )


def _labels(images: Mapping[str, Sequence[str]], captioned: Container[str]) -> dict[str, str]:
    """Masks beside their images, by the stem of the image; ``cat-mask.png`` with a caption is an image of its own."""
    found: dict[str, str] = {}
    for stem, files in images.items():
        match = _MASK_LABEL.fullmatch(stem)
        if match and (match["kind"] or (match["stem"] in images and stem not in captioned)):
            found.setdefault(match["stem"], files[0])
    return found


def _masks(root: Path, below: str) -> dict[str, str]:
    """Masks of the images of a folder by stem, in a folder ``masks`` of the set or beside the images."""
    found: dict[str, str] = {}
    for parent, rest in ((root, below), (root / below, "")):
        for entry in _listed(parent):
            folder = os.path.normpath(os.path.join(parent, entry, rest))
            if entry.lower() == MASKS and os.path.isdir(folder):
                names = _by_stem(_listed(folder), None)
                found |= {stem: os.path.join(folder, files[0]) for stem, files in names.items()}
    return found


def _listed(folder: str | os.PathLike[str]) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _by_stem(names: Sequence[str], ending: str | None) -> dict[str, list[str]]:
    """Group files of an ending, or images, by their names without it; an accent may be written in either way."""
    stems: dict[str, list[str]] = {}
    for name in sorted(names):
        stem, found = os.path.splitext(name)
        is_wanted = found.lower() in image_endings() if ending is None else found.lower() == ending
        if is_wanted:
            stems.setdefault(unicodedata.normalize("NFC", stem), []).append(name)
    return stems


def _tell(
    root: Path, pairs: Sequence[_Files], unread: Counter[str], in_masks: Sequence[str]
) -> None:
    """Say what was made of a set, and what in it is not read, ``in_masks`` being the files in folders of masks."""
    num_masks = sum(pair.mask is not None for pair in pairs)
    defaults = Counter(pair.caption for pair in pairs if pair.caption_file is None)
    lines = [f"{len(pairs)} images, {num_masks} with a mask of their own"]
    lines += [f"{count} without a caption get {text!r}" for text, count in defaults.items()]
    if unread:
        lines.append("not read: " + ", ".join(f"{n} {kind}" for kind, n in sorted(unread.items())))
    has_lost_texts = any(kind in unread for kind in CAPTIONS)
    logger.log(
        logging.WARNING if has_lost_texts else logging.INFO,
        "%s: %s.%s",
        root,
        "; ".join(lines),
        " A text has the name of its image, capitals included." if has_lost_texts else "",
    )
    lost = sorted(
        {*map(os.path.normpath, in_masks)}
        - {pair.mask and os.path.normpath(pair.mask) for pair in pairs}
    )
    if lost:
        logger.warning(
            "%s: %d files in folders %s are the mask of no image that is read (%s). A mask has the name of its image, and there "
            "is one for each.",
            root,
            len(lost),
            MASKS,
            printable(", ".join(os.path.relpath(file, root) for file in lost[:3])),
        )
