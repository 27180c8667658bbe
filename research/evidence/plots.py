"""Plots of the demo's evidence, drawn by matplotlib without a display; knows names and intervals only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamcache_core.evaluation.statistics import Interval
from dreamcache_core.packages import require

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
    path: Path,
    *,
    xlabel: str = "scene obedience (share)",
    title: str = "",
) -> None:
    """Plot the subject match of settings against what they cost, a line for each sweep.

    Args:
        sweeps: At least one.
        path: The file to write.
        xlabel: What it costs.
        title: Above the plot.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with _figure(path, (7.5, 5.5)) as figure:
        axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel="subject match")
        for number, sweep in enumerate(sweeps):
            _draw_sweep(axes, sweep, f"C{number}")
        axes.grid(alpha=0.3)
        axes.legend()


def plot_steps(sweeps: Sequence[Sweep], path: Path, *, title: str = "") -> None:
    """Plot the gap closed against training steps, a line for each start; 0 to 100 steps linear, logarithmic beyond.

    Args:
        sweeps: At least one; ``across`` is steps, ``up`` the gap closed.
        path: The file to write.
        title: Above the plot.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with _figure(path, (7.5, 4.5)) as figure:
        axes = figure.add_subplot(title=title, xlabel="training steps", ylabel="gap closed")
        axes.set_xscale("symlog", linthresh=100)
        for number, sweep in enumerate(sweeps):
            _draw_sweep(axes, sweep, f"C{number}")
        steps = sorted({point.across.value for sweep in sweeps for point in sweep.points})
        axes.set_xticks(steps, [f"{step:,.0f}" for step in steps])
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")


def plot_bars(groups: Mapping[str, Sequence[Bar]], path: Path, *, title: str = "") -> None:
    """Plot the subject match of ablations side by side, each with its own bars and all on one scale.

    Args:
        groups: Bars of each ablation, by its name; at least one bar in each.
        path: The file to write.
        title: Above the plot.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    widths = [len(bars) + 1 for bars in groups.values()]
    with _figure(path, (max(4.0, 0.7 * sum(widths)), 4.2)) as figure:
        plots = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (name, bars) in zip(plots, groups.items(), strict=True):
            _draw_bars(axes, bars)
            axes.set_title(name, fontsize=10)
        plots[0].set_ylabel("subject match")
        figure.suptitle(title)


def _draw_sweep(axes: Any, sweep: Sweep, colour: str) -> None:
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
def _figure(path: Path, inches: tuple[float, float]) -> Iterator[Any]:
    """Give a figure to draw in, and write it."""
    with require("matplotlib", "eval"):
        from matplotlib.figure import Figure
    figure = Figure(inches, dpi=DOTS_PER_INCH, layout="constrained")
    yield figure
    figure.savefig(path)
