"""Plots of the demo's evidence, drawn by matplotlib without a display; knows names and intervals only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamcache_core.errors import InputError
from dreamcache_core.evaluation.statistics import Interval
from dreamcache_core.packages import require

FORMATS = (".png", ".svg")
DOTS_PER_INCH = 120


@dataclass(frozen=True)
class SweepPoint:
    """One setting of a sweep.

    Attributes:
        label: The setting, as it stands beside the point.
        across: What it costs.
        up: What it gives.
        is_chosen: Whether it is the setting that is shipped.
    """

    label: str
    across: Interval
    up: Interval
    is_chosen: bool = False


@dataclass(frozen=True)
class Sweep:
    """Settings that belong together.

    Attributes:
        name: Stands in the legend.
        points: In the order of the line; at least one.
        is_joined: Whether a line joins them.
    """

    name: str
    points: Sequence[SweepPoint]
    is_joined: bool = True


@dataclass(frozen=True)
class Bar:
    """One variant of an ablation.

    Attributes:
        label: Stands below the bar.
        value: Its height.
        is_chosen: Whether it is the variant that is shipped.
    """

    label: str
    value: Interval
    is_chosen: bool = False


def plot_pareto(
    sweeps: Sequence[Sweep],
    path: str | Path,
    *,
    xlabel: str = "scene obedience (share)",
    ylabel: str = "subject match",
    title: str = "",
) -> None:
    """Plot what settings give against what they cost, a line for each sweep.

    Args:
        sweeps: At least one.
        path: The file to write, ``.png`` or ``.svg``.
        xlabel: What it costs.
        ylabel: What it gives.
        title: Above the plot.

    Raises:
        InputError: There is nothing to plot, or the file's name ends otherwise.
        MissingPackageError: matplotlib is not installed.
    """
    if not any(sweep.points for sweep in sweeps):
        raise InputError("Expected at least one point to plot, got none. Measure a sweep first.")
    with _figure(path, (7.5, 5.5)) as figure:
        axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
        for number, sweep in enumerate(sweeps):
            _draw_sweep(axes, sweep, f"C{number}")
        axes.grid(alpha=0.3)
        axes.legend()


def plot_bars(
    groups: Sequence[tuple[str, Sequence[Bar]]], path: str | Path, *, ylabel: str, title: str = ""
) -> None:
    """Plot ablations side by side, each with its own bars and all on one scale.

    Args:
        groups: Name and bars of each ablation; at least one bar in each.
        path: The file to write, ``.png`` or ``.svg``.
        ylabel: What the heights are.
        title: Above the plot.

    Raises:
        InputError: There is nothing to plot, or the file's name ends otherwise.
        MissingPackageError: matplotlib is not installed.
    """
    if not groups or not all(bars for _, bars in groups):
        raise InputError("Expected at least one bar in each group, got none. Measure it first.")
    widths = [len(bars) + 1 for _, bars in groups]
    with _figure(path, (max(4.0, 0.7 * sum(widths)), 4.2)) as figure:
        plots = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (name, bars) in zip(plots, groups, strict=True):
            _draw_bars(axes, bars)
            axes.set_title(name, fontsize=10)
        plots[0].set_ylabel(ylabel)
        figure.suptitle(title)


def _draw_sweep(axes: Any, sweep: Sweep, colour: str) -> None:
    if not sweep.points:
        return
    across = [point.across for point in sweep.points]
    up = [point.up for point in sweep.points]
    x, y = [each.value for each in across], [each.value for each in up]
    style = "o-" if sweep.is_joined else "o"
    axes.plot(x, y, style, color=colour, markersize=4, label=sweep.name)
    axes.errorbar(
        x, y, _errors(up), _errors(across), fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.5
    )
    for point in sweep.points:
        place = (point.across.value, point.up.value)
        axes.annotate(point.label, place, (5, 4), textcoords="offset points", fontsize=8)
        if point.is_chosen:
            axes.plot(*place, "*", color=colour, markersize=17, markeredgecolor="black")


def _draw_bars(axes: Any, bars: Sequence[Bar]) -> None:
    values = [bar.value for bar in bars]
    axes.bar(
        range(len(bars)),
        [value.value for value in values],
        yerr=_errors(values),
        color=["C1" if bar.is_chosen else "C0" for bar in bars],
        capsize=3,
    )
    axes.set_xticks(
        range(len(bars)), [bar.label for bar in bars], rotation=35, ha="right", fontsize=8
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _errors(intervals: Sequence[Interval]) -> list[list[float]]:
    """Lengths of the bars below and above each value; never negative."""
    return [
        [max(0.0, each.value - each.low) for each in intervals],
        [max(0.0, each.high - each.value) for each in intervals],
    ]


@contextmanager
def _figure(path: str | Path, inches: tuple[float, float]) -> Iterator[Any]:
    """Give a figure to draw in, and write it; the same numbers give the same bytes."""
    target = Path(path)
    if target.suffix not in FORMATS:
        raise InputError(f"Expected a file name that ends in .png or .svg, got {target.name}.")
    with require("matplotlib", "eval"):
        import matplotlib
        from matplotlib.figure import Figure
    figure = Figure(inches, dpi=DOTS_PER_INCH, layout="constrained")
    yield figure
    # an SVG's own date and random names would change it at every run
    with matplotlib.rc_context({"svg.hashsalt": "dreamcache"}):
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
