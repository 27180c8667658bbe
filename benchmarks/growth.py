"""What more references, more images, larger latents and subject masks cost, and where the reference's tokens dominate."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from dreamcache_core.method.tokens import BACKGROUND_GROUP, num_kept

from .arguments import settings_of
from .flops import count_flops
from .guided import DREAMCACHE, THREE_ROWS, GuidedSteps, Settings
from .report import Bar, Report, machine, table
from .timing import Spread, alternate, ratios

COUNTS = (1, 2, 4, 8)
LATENT_FACTORS = (0.5, 1.0, 1.5, 2.0)
COVERAGE = 0.4
"""Share of the reference's tokens that the subject mask keeps."""

MOST_FOR_EIGHT = 1.35
"""A step with eight references, in times of one with one, at 64 x 64 latents of Stable Diffusion 1 and 2; bound 1.15."""

TOLERANCE = 0.1


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        name: What was changed.
        settings: The setting.
        seconds: Of DreamCache's steps, by round.
        ratio: These in times of the same three rows of the plain U-Net.
        flops: Counted operations of DreamCache's step.
        plain_flops: Those of the plain rows.
        attention_flops: What of DreamCache's is attention over the reference's tokens, by METHOD.md section 4.
    """

    name: str
    settings: Settings
    seconds: Sequence[float]
    ratio: Spread
    flops: int
    plain_flops: int
    attention_flops: int

    @property
    def added_flops(self) -> int:
        """What the reference costs."""
        return self.flops - self.plain_flops


ROUNDS = 3
"""Timed rounds, unless told otherwise."""


def measure(arguments: argparse.Namespace) -> Report:
    """Measure what ``arguments`` ask for; see ``MEASURES``."""
    base = settings_of(arguments)
    references = [
        _measure(f"{count} references", replace(base, references=count), arguments.rounds)
        for count in COUNTS
    ]
    images = [
        _measure(f"{count} images", replace(base, batch=count), arguments.rounds)
        for count in COUNTS
    ]
    latents = [
        _measure(f"{side} x {side} latents", replace(base, latent=side), arguments.rounds)
        for side in dict.fromkeys(
            8 * max(1, round(factor * base.latent / 8)) for factor in LATENT_FACTORS
        )
    ]
    masked = _measure(
        f"subject mask, {COVERAGE:.0%}", replace(base, coverage=COVERAGE), arguments.rounds
    )
    points = [*references, *images, *latents, masked]
    # each in times of plain rows that were measured in turn with it
    eight = references[-1].ratio.median / references[0].ratio.median
    slope, fixed = _line(references)
    own = references[0].attention_flops
    bars = [
        Bar("counted cost of a reference / its attention's own", slope / own, 1 + TOLERANCE),
        Bar("the same", slope / own, 1 - TOLERANCE, at_most=False),
        Bar(
            f"counted attention where the subject covers {COVERAGE:.0%} / over all tokens",
            (masked.added_flops - fixed) / slope,
            (COVERAGE + (1 - COVERAGE) / BACKGROUND_GROUP) * (1 + TOLERANCE),
        ),
    ]
    if base.are_times_promised:
        bars.append(Bar("eight references / one", eight, MOST_FOR_EIGHT))
    return Report(
        name="growth",
        title=(
            f"growth: {base.size} size, from {base.latent} x {base.latent} latents, {base.dtype}, "
            f"{machine(torch.device(base.device))}; median (low - high) of {arguments.rounds} rounds in turn"
        ),
        tables=[
            _table(points),
            _exponent_table({"references": references, "images": images, "latent side": latents}),
            f"Eight references in times of one: {eight:.3f}, counted "
            f"{references[-1].flops / references[0].flops:.3f}. What grows with the reference's tokens overtakes what the "
            f"adapters always cost at {fixed / slope:.1f} references of this size.",
        ],
        figures={
            "settings": asdict(base),
            "machine": machine(torch.device(base.device)),
            "points": [asdict(point) for point in points],
        },
        bars=bars,
        plotted={point.name: point.ratio for point in points},
        plot_label="time of a guided step, the same rows of the plain U-Net = 1",
    )


def _measure(name: str, settings: Settings, rounds: int) -> Point:
    steps = GuidedSteps(settings)
    with steps.ready((DREAMCACHE, THREE_ROWS)) as actions:
        seconds = alternate(actions, rounds, steps.device)
        flops = {key: count_flops(action) for key, action in actions.items()}
    return Point(
        name,
        settings,
        seconds[DREAMCACHE],
        ratios(seconds[DREAMCACHE], seconds[THREE_ROWS]),
        flops[DREAMCACHE],
        flops[THREE_ROWS],
        _attention_flops(steps),
    )


def _attention_flops(steps: GuidedSteps) -> int:
    """Multiply-adds of queries with keys and of weights with values, two operations each; two of three rows see them."""
    rows, reference = 2 * steps.settings.batch, steps.reference
    total = 0
    for layer, maps in reference.features.items():
        count, channels, height, width = maps.shape
        seen = count * height * width
        if reference.masks is not None:
            seen = sum(num_kept(mask.flatten()) for mask in reference.masks[layer])
        total += 4 * rows * height * width * seen * channels
    return total


def _line(points: Sequence[Point]) -> tuple[float, float]:
    """Counted operations that each reference adds, and those that any number of them adds."""
    counts = [point.settings.references for point in points]
    slope, fixed = np.polyfit(counts, [point.added_flops for point in points], 1)
    return float(slope), float(fixed)


def _table(points: Sequence[Point]) -> str:
    # seconds of a CPU say nothing beyond that machine
    on_gpu = points[0].settings.device != "cpu"
    rows = [
        (
            point.name,
            *([f"{Spread.of(point.seconds):.3g}"] if on_gpu else []),
            f"{point.ratio:.3f}",
            f"{point.flops / point.plain_flops:.3f}",
            f"{point.attention_flops / point.added_flops:.0%}",
        )
        for point in points
    ]
    header = (
        "one guided step",
        *(["s"] if on_gpu else []),
        "plain rows = 1",
        "counted bound",
        "attention's share of the rest",
    )
    return table(header, rows)


VARIED: dict[str, Callable[[Settings], int]] = {
    "references": lambda settings: settings.references,
    "images": lambda settings: settings.batch,
    "latent side": lambda settings: settings.latent,
}


def _exponent_table(sweeps: dict[str, Sequence[Point]]) -> str:
    """Powers with which a step's time and operations, and what the reference adds to these, grow."""
    rows: list[tuple[str, ...]] = []
    for name, points in sweeps.items():
        across = np.log([VARIED[name](point.settings) for point in points])
        columns = (
            [min(point.seconds) for point in points],
            [point.flops for point in points],
            [point.added_flops for point in points],
            [point.attention_flops for point in points],
        )
        powers = [np.polyfit(across, np.log(column), 1)[0] for column in columns]
        rows.append((name, *(f"{power:.2f}" for power in powers)))
    header = ("grows with the power", "time", "operations", "of the reference", "of its attention")
    return table(header, rows)
