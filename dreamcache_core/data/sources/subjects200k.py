"""Subjects200K (Yuanshi/Subjects200K) from local parquet files: two images of a subject side by side in a row."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import FileFormatError, InputError
from ...images.files import read_image
from ...packages import require
from .reading import image_size, one_line, stamp_files
from .source import Pair

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".arrow"
"""Folder beside the parquet files in which ``datasets`` keeps its copy, which several processes map into memory."""

LOWEST_SCORE = 5
"""Rows with a quality score below are left out; those that were never rated stay."""

SIDES = ("left", "right")
SIDE_STEP = 64
"""Both images are squares whose sides are a multiple of this; what remains of the height is border."""


COLUMNS = {
    "image": "binary, or struct<bytes: binary>",
    "description": "struct<description_0: string, description_1: string>",
    "quality_assessment": "struct of numbers",
}
"""Types of the columns that are read; the last may be missing."""

_TEXT = ("string", "large_string", "null")
_BYTES = ("binary", "large_binary")
_NUMBER = re.compile(r"u?int\d+|halffloat|float|double|null")


class Subjects200KSource:
    """Two pairs from each row: either image is the target once, with its description, and the other the subject.

    There are no masks: the whole other image is the reference.

    Args:
        path: A parquet file, or the folder that holds them, directly or in ``data``.

    Attributes:
        keys: Number of the row and side of the target, ``0000012-left``.
        problems: Empty; rows of low quality are counted in the log.

    Raises:
        InputError: There are no parquet files, or no row is good enough.
        FileFormatError: They cannot be read, or hold something else.
        MissingPackageError: datasets is not installed.
    """

    problems: tuple[str, ...] = ()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._table = _load(self.path)
        files = parquet_files(self.path)
        stamps = stamp_files(files[0].parent, map(str, files))
        self._stamp = hashlib.sha256(stamps.encode("utf-8", "surrogateescape")).hexdigest()
        self._descriptions = self._table.select_columns(["description"])
        self._rows = self._good_rows()
        if not self._rows:
            raise InputError(f"Expected rows rated {LOWEST_SCORE} or higher in {path}; found none.")
        self.keys = tuple(f"{row:07d}-{side}" for row in self._rows for side in SIDES)

    @property
    def distinct(self) -> Sequence[int]:
        """All indices: nothing is repeated."""
        return range(len(self.keys))

    def files(self, index: int) -> tuple[str, ...]:
        """The set, the row and the side."""
        return (f"{self.path}: row {self._rows[index // 2]}, {SIDES[index % 2]}",)

    def stamp(self, index: int) -> str:
        """Names, sizes and times of the parquet files when they were opened, as SHA-256; and the row."""
        return f"{self._stamp}, {self._rows[index // 2]}"

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the target, pixels, from the row's header."""
        side, _, _ = _squares(*self._image(index))
        return side, side

    def caption(self, index: int) -> str:
        """Description of the target; empty where there is none."""
        description = self._descriptions[self._rows[index // 2]]["description"] or {}
        return one_line(description.get(f"description_{index % 2}") or "")

    def read(self, index: int) -> Pair:
        """Read a pair."""
        data, name = self._image(index)
        side, top, lefts = _squares(data, name)
        image, _ = read_image(data, name)
        target, subject = (
            image[:, top : top + side, left : left + side].contiguous()
            for left in (lefts[index % 2], lefts[1 - index % 2])
        )
        return Pair(target, subject, None, self.caption(index), has_own_subject=True)

    def _good_rows(self) -> list[int]:
        count = len(self._table)
        if "quality_assessment" not in self._table.column_names:
            return list(range(count))
        ratings = self._table.data.column("quality_assessment").to_pylist()
        rows = [row for row, rating in enumerate(ratings) if _is_good(rating)]
        text = "%s: %d of %d rows are left out, as a quality score is below %d."
        logger.info(text, self.path, count - len(rows), count, LOWEST_SCORE)
        return rows

    def _image(self, index: int) -> tuple[bytes, str]:
        """Return the file of both images, and its name for messages."""
        name = self.files(index)[0]
        image = self._table[self._rows[index // 2]]["image"]
        if not image or not image["bytes"]:
            raise FileFormatError(
                f"Expected an image in {name}; there is none. Fetch the set again."
            )
        return image["bytes"], name


def _squares(data: bytes, name: str) -> tuple[int, int, tuple[int, int]]:
    """Find both images, as far from the left border as from the right one: side, top, left of each."""
    height, width = image_size(data, name)
    side = height - height % SIDE_STEP
    border = (height - side) // 2
    if not 0 < 2 * (side + border) <= width < 3 * side:
        raise FileFormatError(
            f"Expected two squares side by side in {name}, got one image of {width} x {height} (width x "
            "height). Is this Subjects200K?"
        )
    return side, border, (border, width - border - side)


def parquet_files(path: Path) -> list[Path]:
    """Return the parquet files of a set in order: a file itself, or those in a folder or in its ``data`` folder."""
    if path.is_file():
        return [path]
    return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))


def _load(path: Path) -> Any:
    with require("datasets", "train"):
        import pyarrow.parquet
        from datasets import Dataset, Image
        from datasets.exceptions import DatasetGenerationError
    files = parquet_files(path)
    if not files:
        raise InputError(f"Expected parquet files in {path}, found none.")
    folder = files[0].parent
    cache: Any = str(folder / CACHE_FOLDER) if os.access(folder, os.W_OK) else None
    try:
        for file in files:
            _check_types(file, pyarrow.parquet.read_schema(file))
        # not load_dataset: it reports the use of a set over the network
        table: Any = Dataset.from_parquet([str(f) for f in files], cache_dir=cache)
    except FileFormatError:
        raise
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise FileFormatError(
            f"Expected parquet files of Subjects200K in {path}: {error.__cause__ or error}. Fetch them again."
        ) from error
    return table.cast_column("image", Image(decode=False))


def _check_types(file: Path, schema: Any) -> None:
    """Refuse a file without the columns that are read, or with others of their names."""
    if not {"image", "description"} <= set(schema.names):
        raise FileFormatError(
            f"Expected the columns image and description in {file}, got {', '.join(schema.names)}. Is this "
            "Subjects200K?"
        )
    for field in schema:
        wanted = COLUMNS.get(field.name)
        if wanted is not None and not _is_fit(field.name, field.type):
            raise FileFormatError(
                f"Expected the column {field.name} in {file} to be {wanted}, got {field.type}. Is this Subjects200K?"
            )


def _is_fit(column: str, kind: Any) -> bool:
    """Whether a column has a type that can be read: arrow's, which is null where there are no values."""
    name = str(kind)
    parts = {part.name: str(part.type) for part in kind} if name.startswith("struct<") else {}
    if column == "image":
        return parts.get("bytes", name) in _BYTES
    if column == "description":
        return all(parts.get(f"description_{side}") in _TEXT for side in range(len(SIDES)))
    return name == "null" or (bool(parts) and all(map(_NUMBER.fullmatch, parts.values())))


def _is_good(rating: Mapping[str, int | None] | None) -> bool:
    scores = [score for score in (rating or {}).values() if score is not None]
    return all(score >= LOWEST_SCORE for score in scores)
