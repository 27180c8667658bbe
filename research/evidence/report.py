"""The demo's evaluation as an HTML report: the tables, and images of the first triples under every condition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dreamcache_core.evaluation.html_report import ImageRow, Table, Thumbnail, write_html_report
from dreamcache_core.images.tensors import image_to_tensor

from .conditions import Condition
from .pages import GROUP_TITLES, TITLES, Evidence, table_cells
from .triples import Triple

REPORT = "report.html"
NUM_SHOWN = 8
"""Triples of each group whose images are kept."""

SIDE_PX = 96


def keep_images(folder: Path, triples: Sequence[Triple], images: np.ndarray) -> None:
    """Save the images of the first triples of each group.

    Args:
        folder: The condition's; made where it is missing.
        triples: What was generated.
        images: 8-bit RGB, (triples, height, width, 3).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for triple, image in zip(triples, images, strict=True):
        if triple.index < NUM_SHOWN:
            Image.fromarray(image).save(_file(folder, triple))


def write_report(
    evidence: Evidence,
    triples: Sequence[Triple],
    folders: Mapping[Condition, Path],
    out: Path,
) -> Path:
    """Write the report.

    Args:
        evidence: The measurements.
        triples: What was measured.
        folders: Where ``keep_images`` put each condition's images.
        out: The folder; made where it is missing.

    Returns:
        The file.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    tables = [
        Table(
            GROUP_TITLES[group],
            TITLES,
            [table_cells(evidence, condition, group) for condition in evidence.rows],
        )
        for group in evidence.groups
    ]
    write_html_report(
        out / REPORT,
        title="Measured on the demo model",
        tables=tables,
        image_rows=_image_rows(evidence, triples, folders),
        notes=[
            f"Written by: {evidence.command}",
            f"Images: the first {NUM_SHOWN} triples of each group, nothing chosen. Reference; what a perfect model "
            "might draw; then each condition, with its subject match.",
        ],
    )
    return out / REPORT


def _image_rows(
    evidence: Evidence, triples: Sequence[Triple], folders: Mapping[Condition, Path]
) -> Iterator[ImageRow]:
    matches = {
        condition: {(row.group, row.index): row.match for row in rows}
        for condition, rows in evidence.rows.items()
    }
    for triple in triples:
        if triple.index >= NUM_SHOWN:
            continue
        thumbnails = [
            Thumbnail(image_to_tensor(triple.reference()), "reference"),
            Thumbnail(image_to_tensor(triple.true_image()), "perfect"),
        ]
        for condition in evidence.rows:
            path = _file(folders[condition], triple)
            if path.is_file():
                match = matches[condition][triple.group, triple.index]
                thumbnails.append(Thumbnail(path, f"{condition.name}: {match:.2f}"))
        yield ImageRow(f"{triple.prompt} (seed {triple.seed})", thumbnails, SIDE_PX)


def _file(folder: Path, triple: Triple) -> Path:
    return folder / f"{triple.group}-{triple.index:03d}.png"
