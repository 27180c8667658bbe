"""A whole image in ComfyUI with and without DreamCache: time, our own Python, waits for the device, and loading the pack."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dreamcache_core.errors import InputError

from .arguments import positive, settings_of
from .comfyui import add_folder, find_comfyui, measure_inside
from .inside.run import (
    ENCODE,
    OURS,
    PLAIN,
    RANGED,
    READ_STEPS,
    STEP_PLAIN,
    TIMED,
    WATCHED_STEPS,
)
from .models import SIZES
from .report import Bar, Report, machine, table
from .timing import Spread, ratios

MB = 1e6
LONGEST_LOADING_S, MOST_PYTHON_MS = 0.3, 1.0
MOST_READS, MOST_READS_WITH_RANGES = 0.0, 1.0


ROUNDS = 3
"""Timed rounds, unless told otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what this benchmark takes besides ``add_common``'s and ``add_model``'s."""
    parser.add_argument("--steps", type=positive, default=20, help="sampling steps of an image")
    add_folder(parser)


def measure(arguments: argparse.Namespace) -> Report:
    """Measure what ``arguments`` ask for; see ``MEASURES``."""
    settings = settings_of(arguments)
    comfyui = find_comfyui(arguments.comfyui)
    if settings.size not in SIZES or min(SIZES[settings.size].unet) < 32:
        raise InputError(f"--size {settings.size} cannot be built in ComfyUI here. Use small.")
    found = _measure(comfyui, arguments, settings.latent)
    seconds, steps = found["seconds"], arguments.steps
    against = {name: ratios(seconds[name], seconds[PLAIN]) for name in TIMED}
    # in plain steps, so that it holds for any number of them
    encoding = ratios(seconds[ENCODE], [total / steps for total in seconds[PLAIN]])
    step_seconds = found["step_seconds"]
    step = {name: ratios(values, step_seconds[STEP_PLAIN]) for name, values in step_seconds.items()}
    python_ms = 1e3 * statistics.median(found["own_python_s"]) / steps
    reads, with_ranges = (_reads_a_step(found["reads"], name) for name in (OURS, RANGED))
    return Report(
        name="run",
        title=(
            f"run: {settings.size} size, {settings.latent} x {settings.latent} latents, {settings.dtype}, {steps} steps in ComfyUI "
            f"({comfyui.name}), {machine(torch.device(settings.device))}; median (low - high) of {arguments.rounds} "
            "rounds in turn. Of an image the sampling alone is timed, without text encoder and VAE"
            f"{', in processor time of all threads' if settings.device == 'cpu' else ''}."
        ),
        tables=[
            _image_table(found, against),
            table(
                ("ComfyUI's U-Net without its sampler", "three plain rows = 1"),
                [(name, f"{ratio:.3f}") for name, ratio in step.items()],
            ),
            table(
                ("besides", "measured"),
                [
                    (
                        "Encode Reference once, VAE included, in steps of the plain graph",
                        f"{encoding:.2f}",
                    ),
                    (
                        "reference in main memory, MB in half precision",
                        f"{2 * found['cached_values'] / MB:.1f}",
                    ),
                    ("time in our own Python, ms a step", f"{python_ms:.3f}"),
                    (
                        "reads that a GPU would have to finish for, more than plain, a step",
                        f"{reads:g}",
                    ),
                    ("the same with ranges of reference and guidance", f"{with_ranges:g}"),
                    ("loading the pack, s", f"{found['loading_s']:.3f}"),
                ],
            ),
        ],
        figures={
            "settings": asdict(settings),
            "machine": machine(torch.device(settings.device)),
            **found,
        },
        bars=[
            Bar("time in our own Python, ms a step", python_ms, MOST_PYTHON_MS),
            Bar("reads of the device a step, more than plain", reads, MOST_READS),
            Bar("the same with ranges", with_ranges, MOST_READS_WITH_RANGES),
            Bar("loading the pack, s", found["loading_s"], LONGEST_LOADING_S),
        ],
        plotted=against,
        plot_label="time of an image in ComfyUI, plain graph = 1",
    )


def _image_table(found: Mapping[str, Any], against: Mapping[str, Spread]) -> str:
    """Time, predictions and memory of an image in each way; seconds of a CPU say nothing beyond that machine."""
    peaks = found["peak_bytes"]
    header = [
        "an image",
        "plain graph = 1",
        "predictions a step",
        "adapters, MB in half precision",
        "keys and values, likewise",
    ]
    rows: list[list[str]] = []
    for name, ratio in against.items():
        watched = found["watched"][name]
        held = [f"{2 * watched[part] / MB:.1f}" for part in ("adapters", "keys_values")]
        row = [name, f"{ratio:.3f}", f"{watched['rows'] / WATCHED_STEPS:g}", *held]
        if peaks:
            row += [f"{peaks[name] / MB:.0f}", f"{Spread.of(found['seconds'][name]):.3g}"]
        rows.append(row)
    return table(header + ["peak, MB", "s"] * bool(peaks), rows)


def _reads_a_step(reads: Mapping[str, Mapping[str, int]], name: str) -> float:
    """Reads of each step beyond those of the plain run; what happens once a run is left out."""
    few, many = READ_STEPS
    more = {count: reads[str(count)][name] - reads[str(count)][PLAIN] for count in READ_STEPS}
    return (more[many] - more[few]) / (many - few)


def _measure(comfyui: Path, arguments: argparse.Namespace, latent: int) -> Mapping[str, Any]:
    size = SIZES[arguments.size]
    request = {
        "device": arguments.device,
        "size": {
            "widths": size.unet,
            "heads": size.heads,
            "text_width": size.text_width,
            "linear_projection": size.linear_projection,
            "vae_width": max(32, size.vae[0]),  # ComfyUI's VAE has norms of 32 groups
            "dtype": arguments.dtype,
        },
        "latent": latent,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
    }
    return measure_inside(comfyui, "run", request)
