"""What a benchmark says: tables and bars for a terminal, the same as JSON, and a plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .timing import Spread


@dataclass(frozen=True)
class Bar:
    """One thing that is promised.

    Attributes:
        what: The thing, with its unit.
        value: What was measured.
        limit: What is promised.
        at_most: Whether the value may not be above the limit; else not below.
    """

    what: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        relation = "at most" if self.at_most else "at least"
        verdict = "holds" if self.holds else "MISSED"
        return f"{verdict}: {self.what}: {self.value:.4g}, {relation} {self.limit:.4g}"


@dataclass(frozen=True)
class Report:
    """All of one benchmark's results.

    Attributes:
        name: Name of the benchmark and of its files.
        title: What was measured, and how.
        tables: Tables, as ``table`` returns them.
        figures: The numbers, as JSON takes them.
        bars: What is promised.
        plotted: Ratios to plot, by name.
        plot_label: What the ratios are.
    """

    name: str
    title: str
    tables: Sequence[str]
    figures: Mapping[str, Any]
    bars: Sequence[Bar] = ()
    plotted: Mapping[str, Spread] = field(default_factory=dict[str, Spread])
    plot_label: str = ""


def publish(report: Report, out: Path | None) -> int:
    """Print a report; write it as JSON and, where it has ratios, as a plot.

    Args:
        report: The results.
        out: Folder for ``NAME.json`` and ``NAME.png``, made where it is missing; ``None``: nothing is written.

    Returns:
        Exit status: 0 where all bars hold.
    """
    print(report.title, *report.tables, sep="\n\n")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{report.name}.json").write_text(_as_json(report), encoding="utf-8")
        if report.plotted:
            try:
                _plot(report, out / f"{report.name}.png")
            except ImportError:
                print("\nNo plot is drawn: matplotlib is not installed.")
    print()
    for bar in report.bars:
        print(bar)
    missed = sum(not bar.holds for bar in report.bars)
    held = f"{len(report.bars) - missed} of {len(report.bars)} bars hold."
    print(f"{report.name}: {held if report.bars else 'nothing is promised.'}", flush=True)
    return 1 if missed else 0


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right.

    Args:
        header: Names of the columns.
        rows: Their entries, as many in each row.

    Returns:
        Lines, the second of which underlines the header.
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            entry.rjust(width) if column else entry.ljust(width)
            for column, (entry, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def machine(device: torch.device) -> str:
    """Name what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _as_json(report: Report) -> str:
    bars = [{**asdict(bar), "holds": bar.holds} for bar in report.bars]
    content = {"title": report.title, "torch": torch.__version__, **report.figures, "bars": bars}
    return json.dumps(content, indent=2)


def _plot(report: Report, path: Path) -> None:
    """Draw the ratios as bars with their spread."""
    from matplotlib.figure import Figure

    names, spreads = list(report.plotted), list(report.plotted.values())
    figure = Figure((7.0, 1.2 + 0.4 * len(names)), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=report.name, xlabel=report.plot_label)
    medians = [spread.median for spread in spreads]
    reach = [
        [spread.median - spread.low for spread in spreads],
        [spread.high - spread.median for spread in spreads],
    ]
    axes.barh(names, medians, xerr=reach, capsize=3)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)
