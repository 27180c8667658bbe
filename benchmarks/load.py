"""Opening adapters and references, and what the pack costs ComfyUI's start."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from dreamcache_core import ReferenceCache, load_adapters, save_adapters

from .arguments import settings_of
from .guided import GuidedSteps
from .report import Report, machine, table
from .timing import alternate, ratios

OURS, PLAIN, COPY = "DreamCache", "safetensors, unchecked", "read through Python"


ROUNDS = 5
"""Timed rounds, unless told otherwise."""


def measure(arguments: argparse.Namespace) -> Report:
    """Measure what ``arguments`` ask for; see ``MEASURES``."""
    settings = settings_of(arguments)
    steps = GuidedSteps(settings)
    rows: list[tuple[str, ...]] = []
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="dreamcache-") as folder:
        adapters, reference = Path(folder) / "a.safetensors", Path(folder) / "r.safetensors"
        save_adapters(steps.adapters, adapters)
        steps.reference.save(reference)
        for name, path, open_file in (
            ("adapters", adapters, load_adapters),
            ("reference", reference, ReferenceCache.load),
        ):
            actions: dict[str, Callable[[], object]] = {
                OURS: lambda path=path, open_file=open_file: open_file(path),
                PLAIN: lambda path=path: load_file(path),
                COPY: path.read_bytes,
            }
            seconds = alternate(actions, arguments.rounds, torch.device("cpu"))
            figures[name] = seconds
            size = f"{path.stat().st_size / 1e6:.1f}"
            rows += [
                (f"{name}: {way}", size, f"{ratios(values, seconds[COPY]):.2f}")
                for way, values in seconds.items()
            ]
    return Report(
        name="load",
        title=(
            f"load: {settings.size} size, {machine(torch.device('cpu'))}; median (low - high) of {arguments.rounds} "
            "rounds in turn. How long the pack takes to load in ComfyUI stands in run."
        ),
        tables=[table(("opening", "MB", f"{COPY} = 1"), rows)],
        figures={"settings": asdict(settings), "seconds": figures},
    )
