"""A whole image in ComfyUI with and without DreamCache: time, our own Python, waits for the device, and loading the pack."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dreamcache_core.errors import InputError

from .arguments import positive, settings_of
from .inside_comfyui import OURS, PLAIN, RANGED, READ_STEPS, STEP_PLAIN, THREE
from .models import SIZES
from .report import Bar, Report, machine, ratio_table, table
from .timing import ratios

INSIDE = Path(__file__).with_name("inside_comfyui.py")
LONGEST_LOADING_S, MOST_PYTHON_MS = 0.3, 1.0
MOST_READS, MOST_READS_WITH_RANGES = 0.0, 1.0


ROUNDS = 3
"""Timed rounds, unless told otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what this benchmark takes besides ``add_common``'s."""
    parser.add_argument("--steps", type=positive, default=50, help="sampling steps of an image")
    parser.add_argument(
        "--comfyui", type=Path, help="ComfyUI's folder; else COMFYUI_PATH's first, else ~/ComfyUI"
    )


def measure(arguments: argparse.Namespace) -> Report:
    """Measure what ``arguments`` ask for; see ``MEASURES``."""
    settings = settings_of(arguments)
    comfyui = _find_comfyui(arguments.comfyui)
    if settings.size not in SIZES or min(SIZES[settings.size].unet) < 32:
        raise InputError(f"--size {settings.size} cannot be built in ComfyUI here. Use small.")
    found = _measure(comfyui, arguments, settings.latent)
    seconds, steps = found["seconds"], arguments.steps
    against = {name: ratios(values, seconds[THREE]) for name, values in seconds.items()}
    step_seconds = found["step_seconds"]
    step = {name: ratios(values, step_seconds[STEP_PLAIN]) for name, values in step_seconds.items()}
    python_ms = 1e3 * statistics.median(found["own_python_s"]) / steps
    reads, with_ranges = (_reads_a_step(found["reads"], name) for name in (OURS, RANGED))
    return Report(
        name="run",
        title=(
            f"run: {settings.size} size, {settings.latent} x {settings.latent} latents, {steps} steps in ComfyUI "
            f"({comfyui.name}), {machine(torch.device(settings.device))}; median (low - high) of {arguments.rounds} "
            "rounds in turn"
        ),
        tables=[
            ratio_table("an image", against, seconds, settings.device),
            ratio_table("ComfyUI's U-Net without its sampler", step, step_seconds, settings.device),
            table(
                ("besides", "measured"),
                [
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
        plot_label="time of an image in ComfyUI, three plain rows = 1",
    )


def _reads_a_step(reads: Mapping[str, Mapping[str, int]], name: str) -> float:
    """Reads of each step beyond those of the plain run; what happens once a run is left out."""
    few, many = READ_STEPS
    more = {count: reads[str(count)][name] - reads[str(count)][PLAIN] for count in READ_STEPS}
    return (more[many] - more[few]) / (many - few)


def _find_comfyui(given: Path | None) -> Path:
    named = os.environ.get("COMFYUI_PATH", "").split(os.pathsep)[0]
    folder = given or Path(named or Path.home() / "ComfyUI")
    if not (folder / "comfyui_version.py").is_file():
        raise InputError(
            f"There is no ComfyUI in {folder}. Give its folder by --comfyui or COMFYUI_PATH."
        )
    return folder


def _measure(comfyui: Path, arguments: argparse.Namespace, latent: int) -> Mapping[str, Any]:
    size = SIZES[arguments.size]
    request = {
        "comfyui": str(comfyui),
        "device": arguments.device,
        "widths": size.unet,
        "heads": size.heads,
        "text_width": size.text_width,
        "latent": latent,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
    }
    own = comfyui / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else "python3"
    done = subprocess.run(
        [python, str(INSIDE), json.dumps(request)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise InputError(f"The measurement inside {comfyui} ended with {done.returncode}.")
    return json.loads(done.stdout.strip().splitlines()[-1])
