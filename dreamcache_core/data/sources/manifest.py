"""A list of pairs in one JSONL or CSV file: ``image``, ``caption``, and where wanted ``mask`` and ``subject``."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FileFormatError, InputError
from ...files.texts import parse_json, read_text
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

SUFFIXES = (".jsonl", ".csv")
COLUMNS = ("image", "caption", "mask", "subject")
FURTHER = "\0"
"""Key of cells that have no column."""
ALIASES = {"file_name": "image", "text": "caption"}
"""Columns as Hugging Face's ImageFolder names them, and what they are here."""


class _Row(NamedTuple):
    """Paths are full; empty where there is none."""

    image: str
    caption: str
    mask: str
    subject: str


class ManifestSource(FileSource):
    """Pairs that a file lists, one to a line, in its order.

    Columns (CSV) or keys (JSONL): ``image``, the target; ``caption``; optionally ``subject``, another image of the
    target's subject, else it is the target itself; optionally ``mask``, of the subject's image, else the alpha
    channel of that image serves, and without one the whole image is the subject. Paths are relative to the file's
    folder. ``file_name`` and ``text`` (Hugging Face's ImageFolder) are image and caption. Further columns are not read.

    Args:
        path: The file, UTF-8, ending in ``.jsonl`` or ``.csv``.

    Attributes:
        keys: The ``image`` of every pair as it is written; ``#2`` and so on follow where it is listed again.
        problems: What was left out as incomplete, and why.

    Raises:
        InputError: There is no such file, a column is missing, or no pair is complete.
        FileFormatError: It is not UTF-8 or no CSV.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file() or self.path.suffix.lower() not in SUFFIXES:
            raise InputError(f"Expected a file ending in {' or '.join(SUFFIXES)}, got {path}.")
        problems: list[str] = []
        lines = list(_entries(self.path, problems))
        _note_unread(self.path, lines)
        found = list(_complete(self.path, lines, problems))
        self.keys = tuple(_unique(key for key, _ in found))
        self._rows = tuple(row for _, row in found)
        self.problems = require_pairs(self.path, len(found), problems)

    def files(self, index: int) -> tuple[str, ...]:
        """Paths of the images of a pair."""
        row = self._rows[index]
        return tuple(path for path in (row.image, row.subject, row.mask) if path)

    def stamp(self, index: int) -> str:
        """Caption of a pair; names, sizes and times of its images."""
        return f"{self.caption(index)}; {stamp_files(self.path.parent, self.files(index))}"

    def image(self, index: int, part: Part) -> NamedFile | None:
        """Find an image of a pair."""
        row = self._rows[index]
        path = row.image if part == "target" else getattr(row, part)
        return (path, None) if path else None

    def caption(self, index: int) -> str:
        """Caption of a pair."""
        return self._rows[index].caption


def _entries(path: Path, problems: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield line number and columns of each line that holds any."""
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        yield from _json_lines(path, text, problems)
    else:
        yield from _csv_lines(path, text, problems)


def _json_lines(
    path: Path, text: str, problems: list[str]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            problems.append(f"{path.name}, line {number}: no JSON ({error}); write one object.")
            continue
        if isinstance(entry, dict):
            yield number, {_renamed(name, entry): value for name, value in entry.items()}
        else:
            problems.append(f"{path.name}, line {number}: no object in {{}}; write one.")


def _csv_lines(
    path: Path, text: str, problems: list[str]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=FURTHER, strict=True)
    try:
        given = list(reader.fieldnames or ())
        reader.fieldnames = [_renamed(name, given) for name in given]
        missing = [name for name in COLUMNS[:2] if name not in reader.fieldnames]
        if missing:
            raise InputError(
                f"Expected a first line with the columns {', '.join(COLUMNS[:2])} in {path}, separated by commas; "
                f"{' and '.join(missing)} missing in {given}. Name the columns so."
            )
        twice = [name for name, count in Counter(reader.fieldnames).items() if count > 1]
        if twice:
            raise InputError(
                f"Expected each column once in {path}, got {', '.join(twice)} several times in {given}. Remove one."
            )
        for row in reader:
            if any(row.pop(FURTHER, ())):
                problems.append(
                    f"{path.name}, line {reader.line_num}: has more cells than columns; put a text with commas into quotes."
                )
            else:
                yield reader.line_num, row
    except csv.Error as error:
        raise FileFormatError(
            f"Expected CSV in {path}, line {reader.line_num}: {error}. Mind the quotes."
        ) from error


def _renamed(name: str, names: Container[str]) -> str:
    """Name of a column here; an alias counts where its column is missing."""
    known = ALIASES.get(name, name)
    return name if known in names else known


def _note_unread(path: Path, lines: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """Name columns that are not read: one of them may be misspelt."""
    unread = sorted({str(key) for _, entry in lines for key in entry} - {*COLUMNS, ""})
    if unread:
        logger.warning(
            "%s: of its columns %s are not read; those that are: %s.",
            path,
            printable(", ".join(unread)),
            ", ".join(COLUMNS),
        )


def _complete(
    path: Path, lines: Iterable[tuple[int, Mapping[str, Any]]], problems: list[str]
) -> Iterator[tuple[str, _Row]]:
    """Yield key and row of each line whose files are there; note the others."""
    exists = _Listing()
    for number, entry in lines:
        texts = ["" if entry.get(column) is None else entry[column] for column in COLUMNS]
        if not all(isinstance(text, str) for text in texts) or not texts[0]:
            problems.append(
                f"{path.name}, line {number}: needs a text for image and for caption, and for mask and subject where they are given."
            )
            continue
        if "caption" not in entry or entry["caption"] is None:
            problems.append(f"{path.name}, line {number}: {texts[0]} has no caption; add one.")
            continue
        image, mask, subject = (
            os.path.join(path.parent, texts[i]) if texts[i] else "" for i in (0, 2, 3)
        )
        lost = [file for file in (image, mask, subject) if file and not exists(file)]
        if lost:
            problems.append(f"{path.name}, line {number}: there is no {lost[0]}; add the file.")
            continue
        yield printable(texts[0]), _Row(image, printable(one_line(texts[1])), mask, subject)


class _Listing:
    """Tells whether files exist; lists each folder once, as asking for each file is slow on network drives."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def __call__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            try:
                self._names[folder] = {entry.name for entry in os.scandir(folder or ".")}
            except (OSError, ValueError):
                self._names[folder] = set()
        # not listed: perhaps in other capitals, on a file system that does not mind
        return name in self._names[folder] or os.path.isfile(path)


def _unique(keys: Iterable[str]) -> Iterator[str]:
    counts: dict[str, int] = {}
    for key in keys:
        unique = key
        while unique in counts:  # a row may be named as another one's repetition
            counts[key] += 1
            unique = f"{key}#{counts[key]}"
        counts[unique] = 1
        yield unique
