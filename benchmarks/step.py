"""One guided step: DreamCache, the same rows through the plain U-Net, the textbook form, and plain guidance."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from .arguments import settings_of
from .flops import count_flops
from .guided import (
    COMPILED,
    COMPILED_ROWS,
    DREAMCACHE,
    DREAMCACHE_JOINT,
    DREAMCACHE_TWO,
    TEXTBOOK,
    THREE_ROWS,
    THREE_ROWS_AGAIN,
    TWO_ROWS,
    GuidedSteps,
)
from .report import Bar, Report, machine, table
from .timing import Spread, alternate, noise_warning, ratios

PROMISED = (
    ("guided step / the same three rows of the plain U-Net", DREAMCACHE, THREE_ROWS, 1.08),
    ("step at image_guidance 1 / plain guidance", DREAMCACHE_TWO, TWO_ROWS, 1.10),
    ("step with joint guidance / plain guidance", DREAMCACHE_JOINT, TWO_ROWS, 1.10),
)
"""What the bar says, the step, the plain step, and how many times the plain one it may take on the CPU; counted operations
allow 1.031, 1.047 and 1.023 at SD 2.1 size."""

MOST_OVER_BOUND = 1.02
"""All of them on a GPU, in times of what counted operations allow."""


ROUNDS = 5
"""Timed rounds, unless told otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what this benchmark takes besides ``add_common``'s and ``add_model``'s."""
    parser.add_argument(
        "--compile",
        choices=("inductor", "eager"),
        help="torch.compile the U-Net as well, by this back end; the first call, which compiles, is not timed",
    )


def measure(arguments: argparse.Namespace) -> Report:
    """Measure what ``arguments`` ask for; see ``MEASURES``."""
    settings = settings_of(arguments)
    steps = GuidedSteps(settings)
    with steps.ready(backend=arguments.compile) as actions:
        seconds = alternate(actions, arguments.rounds, steps.device)
        # compiled, the same operations are hidden from the counter
        source = {COMPILED: DREAMCACHE, COMPILED_ROWS: THREE_ROWS}
        flops = {name: count_flops(actions[source.get(name, name)]) for name in actions}
    base, plain_flops = seconds[THREE_ROWS], flops[THREE_ROWS]
    against = {name: ratios(values, base) for name, values in seconds.items()}
    bound = {name: count / plain_flops for name, count in flops.items()}
    # seconds of a CPU say nothing beyond that machine
    on_gpu = settings.device != "cpu"
    rows = [
        (
            name,
            f"{against[name]:.3f}",
            f"{bound[name]:.3f}",
            f"{flops[name] / 1e12:.4f}",
            *([f"{Spread.of(seconds[name]):.3g}"] if on_gpu else []),
        )
        for name in actions
    ]
    bars: list[Bar] = []
    if settings.are_times_promised:
        for what, name, plain, limit in PROMISED:
            counted = MOST_OVER_BOUND * flops[name] / flops[plain]
            taken = ratios(seconds[name], seconds[plain]).median
            bars.append(Bar(what, taken, limit if settings.device == "cpu" else counted))
    header = (
        "a step",
        "three plain rows = 1",
        "counted bound",
        "TFLOP",
        *(["s"] if on_gpu else []),
    )
    tables = [table(header, rows)]
    if TEXTBOOK in actions:
        textbook = ratios(seconds[TEXTBOOK], seconds[DREAMCACHE])
        # the reference's share of both, attention included
        saved = 1 - (flops[DREAMCACHE] - plain_flops) / (flops[TEXTBOOK] - plain_flops)
        counted = flops[TEXTBOOK] / flops[DREAMCACHE]
        tables.append(
            f"Textbook / DreamCache: {textbook:.3f}, counted {counted:.3f}; {saved:.1%} of the adapters' "
            "multiply-adds are saved, attention counted."
        )
        if settings.are_times_promised:
            # counted, one part in a hundred: no median of a few rounds tells that. Slower in all of them would be slower
            bars.append(
                Bar("textbook step / guided step, best round", textbook.high, 1.0, at_most=False)
            )
    tables += noise_warning(against[THREE_ROWS_AGAIN])
    return Report(
        name="step",
        title=(
            f"step: {settings.size} size, {settings.latent} x {settings.latent} latents, {settings.dtype}, "
            f"{machine(steps.device)}; median (low - high) of {arguments.rounds} rounds in turn"
        ),
        tables=tables,
        figures={
            "settings": asdict(settings),
            "machine": machine(steps.device),
            "seconds": seconds,
            "flops": flops,
        },
        bars=bars,
        plotted=against,
        plot_label="time of a step, three plain rows = 1",
    )
