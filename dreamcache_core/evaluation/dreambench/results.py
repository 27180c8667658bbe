"""From scores of images to tables, CSV files and a report."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ...files.whole_files import whole_file
from ..html_report import ImageRow, Table, Thumbnail, write_html_report
from ..statistics import Interval, bootstrap
from .dataset import Candidate, Subject
from .scores import ImageScore

METRICS = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "masked_dino": "masked DINO",
    "masked_clip_i": "masked CLIP-I",
}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Row:
    """A line of a table: a subject, or a group of them.

    Attributes:
        name: Of the subject or group.
        num_subjects: How many.
        num_images: Judged images.
        metrics: By name; without those that no image has.
    """

    name: str
    num_subjects: int
    num_images: int
    metrics: Mapping[str, Interval]


@dataclass(frozen=True)
class Results:
    """All tables.

    Attributes:
        overall: All subjects, the two kinds, and the real images among themselves.
        subjects: A row for each; plain means of its images.
    """

    overall: Sequence[Row]
    subjects: Sequence[Row]


def estimate_mean(values: Sequence[float]) -> Interval:
    """Estimate a mean.

    Args:
        values: One for each subject, at least one.

    Returns:
        The mean, with its ends where there are at least two values.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    interval = Interval(fmean(values))
    if len(values) < 2:
        return interval
    return replace(bootstrap([values], np.mean), value=interval.value)


def summarise(scores: Sequence[ImageScore], subjects: Sequence[Subject]) -> Results:
    """Average scores over a subject's images, and these means over subjects.

    Args:
        scores: Of all images.
        subjects: The subjects that they show.

    Returns:
        The tables.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    generated = [score for score in scores if not score.is_real]
    rows = [_subject_row(subject, generated) for subject in subjects]
    kinds = [(row, subject.entry.is_live) for row, subject in zip(rows, subjects, strict=True)]
    real = [score for score in scores if score.is_real]
    groups = {
        "all subjects": rows,
        "objects": [row for row, is_live in kinds if not is_live],
        "live subjects": [row for row, is_live in kinds if is_live],
        "real images": [_subject_row(subject, real) for subject in subjects],
    }
    overall = [_group_row(name, group) for name, group in groups.items()]
    return Results(
        [row for row in overall if row.num_images], [row for row in rows if row.num_images]
    )


def write_tables(folder: Path, results: Results, scores: Sequence[ImageScore]) -> None:
    """Write ``overall.csv``, ``subjects.csv`` and ``images.csv``.

    Args:
        folder: Existing folder.
        results: The tables.
        scores: Of all images.

    Raises:
        OSError: The disk is full.
    """
    heading, ends = ["name", "subjects", "images"], ("", "_low", "_high")
    overall = [*heading, *(f"{name}{end}" for name in METRICS for end in ends)]
    _write_csv(folder / "overall.csv", overall, map(_cells, results.overall))
    subjects = [*heading, *METRICS]
    plain = (_cells(row, ends=0) for row in results.subjects)
    _write_csv(folder / "subjects.csv", subjects, plain)
    images = [field.name for field in fields(ImageScore)]
    _write_csv(folder / "images.csv", images, (astuple(score) for score in scores))


def write_report(
    path: Path,
    results: Results,
    scored: Sequence[tuple[Candidate, ImageScore]],
    *,
    notes: Sequence[str],
    num_repeats: int,
) -> None:
    """Write the HTML page: tables, then for each subject its reference and its images.

    Args:
        path: The file.
        results: The tables.
        scored: All images with their scores.
        notes: Paragraphs: what was measured, and how.
        num_repeats: Images of each prompt that are shown; 0: no images.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    write_html_report(
        path,
        title="DreamBench",
        tables=_tables(results),
        image_rows=_image_rows(scored, num_repeats),
        notes=notes,
    )


def overall_lines(results: Results) -> Iterator[str]:
    """Yield the table of all subjects as text.

    Args:
        results: The tables.
    """
    for row in results.overall:
        metrics = ", ".join(f"{METRICS[name]} {value}" for name, value in row.metrics.items())
        yield f"{row.name} ({row.num_subjects} subjects, {row.num_images} images): {metrics}"


def _subject_row(subject: Subject, scores: Sequence[ImageScore]) -> Row:
    own = [score for score in scores if score.subject == subject.name]
    values = {name: [getattr(score, name) for score in own] for name in METRICS}
    known = {name: [v for v in entries if v is not None] for name, entries in values.items()}
    metrics = {name: Interval(fmean(entries)) for name, entries in known.items() if entries}
    return Row(subject.name, 1, len(own), metrics)


def _group_row(name: str, rows: Sequence[Row]) -> Row:
    filled = [row for row in rows if row.num_images]
    means = {
        metric: [row.metrics[metric].value for row in filled if metric in row.metrics]
        for metric in METRICS
    }
    metrics = {metric: estimate_mean(values) for metric, values in means.items() if values}
    return Row(name, len(filled), sum(row.num_images for row in filled), metrics)


def _cells(row: Row, ends: int = 2) -> list[str | float | None]:
    cells: list[str | float | None] = [row.name, row.num_subjects, row.num_images]
    for name in METRICS:
        values = astuple(row.metrics.get(name, Interval(nan)))[: 1 + ends]
        cells += [None if isnan(value) else value for value in values]
    return cells


def _write_csv(path: Path, heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heading)
        writer.writerows(map(_as_text, row) for row in rows)


def _as_text(cell: Any) -> Any:
    """Mark text that a spreadsheet would take for a formula as text."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell


def _tables(results: Results) -> list[Table]:
    used = [name for name in METRICS if any(name in row.metrics for row in results.overall)]
    headings = [METRICS[name] for name in used]

    def values(row: Row) -> list[str | None]:
        found = [row.metrics.get(name) for name in used]
        return [None if value is None else str(value) for value in found]

    return [
        Table(
            "Overall, with 95 % confidence intervals over subjects",
            ["", "subjects", "images", *headings],
            [[row.name, row.num_subjects, row.num_images, *values(row)] for row in results.overall],
        ),
        Table(
            "Subjects",
            ["subject", "images", *headings],
            [[row.name, row.num_images, *values(row)] for row in results.subjects],
        ),
    ]


def _image_rows(
    scored: Sequence[tuple[Candidate, ImageScore]], num_repeats: int
) -> Iterator[ImageRow]:
    shown: dict[str, list[tuple[Candidate, ImageScore]]] = {}
    for candidate, score in scored:
        if candidate.repeat is not None and candidate.repeat < num_repeats:
            shown.setdefault(candidate.subject.name, []).append((candidate, score))
    for name, pairs in shown.items():
        reference = pairs[0][0].subject.reference.image
        thumbnails = [Thumbnail(candidate.photo.image, _caption(s)) for candidate, s in pairs]
        yield ImageRow(name, [Thumbnail(reference, "reference"), *thumbnails])


def _caption(score: ImageScore) -> str:
    values = (("DINO", score.dino), ("CLIP-I", score.clip_i), ("CLIP-T", score.clip_t))
    return f"{score.prompt} | " + ", ".join(f"{n} {v:.2f}" for n, v in values if v is not None)
