"""A report of tables and pictures as one HTML page that needs no other file; knows nothing of what it reports."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError, MissingPackageError
from ..image_files import PictureFile, open_picture
from ..picture_tensors import tensor_to_picture
from ..whole_files import whole_file

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: Heading.
        columns: Heading of each column.
        rows: Cells of each row, as many as columns. Floats are shown with ``decimals``, ``None`` as a dash.
        decimals: Digits after the point.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    decimals: int = 3


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A picture of the report.

    Attributes:
        picture: A file, read when the report is written, or a tensor, (1, height, width, 3), float, in [0, 1].
        caption: Text below it.
    """

    picture: PictureFile | Tensor
    caption: str = ""


@dataclass(frozen=True)
class ImageRow:
    """Pictures side by side.

    Attributes:
        title: Heading.
        thumbnails: The pictures.
        side_px: The longer side of each; larger pictures are shrunk, smaller ones stay.
    """

    title: str
    thumbnails: Sequence[Thumbnail]
    side_px: int = 160


def write_html_report(
    path: str | Path,
    *,
    title: str,
    tables: Iterable[Table] = (),
    image_rows: Iterable[ImageRow] = (),
    notes: Iterable[str] = (),
) -> None:
    """Write a page with notes, tables and pictures, in this order; it holds its pictures and styles itself.

    Every text is escaped. Pictures are read one after the other, so that a page of thousands needs little memory.

    Args:
        path: The file to write, in an existing folder; an older one is replaced.
        title: Heading of the page.
        tables: Shown in this order.
        image_rows: Shown in this order; an iterator is read while the page is written.
        notes: Paragraphs: what was measured, and how.

    Raises:
        FileFormatError: A picture file is damaged.
        InputError: A picture is missing, or a row of a table has too many or too few cells.
        MissingPackageError: jinja2 is not installed.
    """
    tables = list(tables)
    for table in tables:
        _check_table(table)
    page: Any = _template().stream(
        title=title, tables=tables, image_rows=image_rows, notes=list(notes)
    )
    with whole_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as stream:
        page.dump(stream)


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingPackageError(
            f"Reports need jinja2 ({error}). Install it: pip install 'dreamcache[eval]'."
        ) from error
    environment: Any = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(cell=_cell, data_url=_data_url)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _check_table(table: Table) -> None:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise InputError(
                f"Expected {len(table.columns)} cells in each row of the table {table.title!r}, got {len(row)}: "
                f"{list(row)}. Give one for each column."
            )


def _cell(value: str | float | None, decimals: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def _data_url(picture: PictureFile | Tensor, side_px: int) -> str:
    """Return a picture, shrunk, as the text that a page can hold in place of a file's name."""
    stream = io.BytesIO()
    _shrunk(picture, side_px).save(stream, format="JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _shrunk(source: PictureFile | Tensor, side_px: int) -> Image.Image:
    """Return an RGB picture whose sides are at most so long; transparent parts become white."""
    if isinstance(source, Tensor):
        picture = tensor_to_picture(source)
        picture.thumbnail((side_px, side_px))
        return picture
    with open_picture(source) as stored:
        picture = ImageOps.exif_transpose(stored).convert("RGBA")
    picture.thumbnail((side_px, side_px))
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
