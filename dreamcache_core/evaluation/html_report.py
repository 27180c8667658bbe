"""A report of tables and images as one HTML page that needs no other file; knows nothing of what it reports."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..files.whole_files import whole_file
from ..images.files import ImageFile, read_image
from ..images.tensors import tensor_to_image
from ..packages import require

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: Heading.
        columns: Heading of each column.
        rows: Cells of each row, as many as columns. Floats are shown with three decimals, ``None`` as a dash.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """An image of the report.

    Attributes:
        image: A file, read when the report is written, or a tensor, (1, height, width, 3), float, in [0, 1].
        caption: Text below it.
    """

    image: ImageFile | Tensor
    caption: str = ""


@dataclass(frozen=True)
class ImageRow:
    """Images side by side.

    Attributes:
        title: Heading.
        thumbnails: The images.
        side_px: The longer side of each; larger images are shrunk, smaller ones stay.
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
    """Write a page with notes, tables and images, in this order; it holds its images and styles itself.

    Every text is escaped. Images are read one after the other, so that a page of thousands needs little memory.

    Args:
        path: The file to write, in an existing folder; an older one is replaced.
        title: Heading of the page.
        tables: Shown in this order.
        image_rows: Shown in this order; an iterator is read while the page is written.
        notes: Paragraphs: what was measured, and how.

    Raises:
        FileFormatError: An image file is damaged.
        InputError: An image is missing, or a row of a table has too many or too few cells.
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
    with require("jinja2", "eval"):
        from jinja2 import Environment, StrictUndefined
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


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _data_url(image: ImageFile | Tensor, side_px: int) -> str:
    """Return an image, shrunk, as the text that a page can hold in place of a file's name."""
    stream = io.BytesIO()
    _shrunk(image, side_px).save(stream, format="JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _shrunk(source: ImageFile | Tensor, side_px: int) -> Image.Image:
    """Return an RGB image whose sides are at most so long; transparent parts become white."""
    if not isinstance(source, Tensor):
        source, alpha = read_image(source)
        if alpha is not None:
            source = source * alpha[..., None] + 1 - alpha[..., None]
    image = tensor_to_image(source)
    image.thumbnail((side_px, side_px))
    return image
