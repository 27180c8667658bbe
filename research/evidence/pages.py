"""The evidence as a Markdown page with plots, and as an HTML report with images of the first triples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamcache_core.evaluation.html_report import ImageRow, Table, Thumbnail, write_html_report
from dreamcache_core.evaluation.statistics import Interval
from dreamcache_core.files.whole_files import whole_file
from dreamcache_core.images.tensors import image_to_tensor
from dreamcache_core.packages import require

from . import paper
from .conditions import CHOSEN, Condition
from .plots import Bar, Sweep, SweepPoint, plot_bars, plot_pareto
from .tables import GROUP_TITLES, TITLES, Evidence, mean_match, mean_obedience, table_cells
from .triples import Triple

TEMPLATE = Path(__file__).parent / "templates" / "page.md.j2"
PAGE, REPORT = "README.md", "report.html"
PARETO, COST, BARS = "pareto.png", "cost.png", "ablations.png"
PARETO_SWEEPS = ("image guidance", "text guidance", "joint", "baseline")
COST_SWEEPS = ("image guidance", "guidance range", "joint", "baseline")

NUM_SHOWN = 8
"""Triples of each group whose images are kept."""

SIDE_PX = 96


def write_page(evidence: Evidence, out: Path) -> list[Path]:
    """Write the page and its plots.

    Args:
        evidence: The measurements.
        out: The folder; made where it is missing.

    Returns:
        The files.

    Raises:
        MissingPackageError: jinja2, scipy or matplotlib is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    plots = _write_plots(evidence, out)
    group = evidence.groups[0]
    variants = {
        str(condition.adapters): [row.match for row in evidence.of(condition, group)]
        for condition in evidence.rows
        if condition.sweep == "variants"
    }
    text = _template().render(
        evidence=evidence,
        group_titles=GROUP_TITLES,
        titles=TITLES,
        table_cells=table_cells,
        mean_match=mean_match,
        plots=plots,
        paper_titles=paper.TITLES,
        same_in_paper=paper.SAME_IN_PAPER,
        same_here=paper.SAME_HERE,
        ablations=list(paper.compare_with_paper(variants)),
        noise=paper.chance_of_training(variants),
    )
    with whole_file(out / PAGE) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return [out / name for name in (PAGE, *plots)]


def _template() -> Any:
    with require("jinja2", "eval"):
        from jinja2 import Environment, StrictUndefined
    environment: Any = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _write_plots(evidence: Evidence, out: Path) -> dict[str, str]:
    """Plot what was measured; return what each file shows."""
    group, written = evidence.groups[0], dict[str, str]()
    title = GROUP_TITLES["combination"]

    def obedience_of(condition: Condition) -> Interval:
        return mean_obedience(evidence.of(condition, group))

    def cost_of(condition: Condition) -> Interval:
        return Interval(*[condition.predictions_a_step(evidence.steps)] * 3)

    if sweeps := _sweeps(evidence, PARETO_SWEEPS, obedience_of):
        plot_pareto(sweeps, out / PARETO, title=title)
        written[PARETO] = "Subject match against scene obedience"
    if sweeps := _sweeps(evidence, COST_SWEEPS, cost_of):
        plot_pareto(sweeps, out / COST, xlabel=TITLES[1], title=title)
        written[COST] = "Subject match against predictions a step"
    bars: dict[str, list[Bar]] = {}
    for condition in evidence.rows:
        if condition.sweep not in (*PARETO_SWEEPS, *COST_SWEEPS):
            value = mean_match(evidence.of(condition, group))
            bar = Bar(condition.name, value, _is_chosen(condition))
            bars.setdefault(condition.sweep, []).append(bar)
    if bars:
        plot_bars(bars, out / BARS, title=title)
        written[BARS] = "Ablations"
    return written


def _sweeps(
    evidence: Evidence, names: Sequence[str], cost: Callable[[Condition], Interval]
) -> list[Sweep]:
    sweeps: list[Sweep] = []
    for name in names:
        points = [
            SweepPoint(
                condition.name.removeprefix(name).strip(),
                cost(condition),
                mean_match(evidence.of(condition, evidence.groups[0])),
                _is_chosen(condition),
            )
            for condition in evidence.rows
            if condition.sweep == name
        ]
        if points:
            sweeps.append(Sweep(name, points, is_joined=name != CHOSEN.sweep))
    return sweeps


def _is_chosen(condition: Condition) -> bool:
    """Whether a condition is what ships, or the variant that stands for it among equals."""
    return condition.drawing == CHOSEN.drawing or condition.adapters == paper.CHOSEN_VARIANT


def keep_images(folder: Path, triples: Sequence[Triple], images: np.ndarray) -> None:
    """Save the images of the first triples of each group, for the report.

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
    evidence: Evidence, triples: Sequence[Triple], folders: Mapping[Condition, Path], out: Path
) -> Path:
    """Write the tables, and what ``keep_images`` kept, as one HTML file.

    Args:
        evidence: The measurements.
        triples: What was measured.
        folders: Where each condition's images are.
        out: An existing folder.

    Returns:
        The file.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
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
                found = evidence.of(condition, triple.group)[triple.index].match
                thumbnails.append(Thumbnail(path, f"{condition.name}: {found:.2f}"))
        yield ImageRow(f"{triple.prompt} (seed {triple.seed})", thumbnails, SIDE_PX)


def _file(folder: Path, triple: Triple) -> Path:
    return folder / f"{triple.group}-{triple.index:03d}.png"
