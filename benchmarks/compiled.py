"""A step with a reference under ComfyUI's TorchCompileModel: its time against plain rows, and what is compiled anew."""

import argparse
from collections.abc import Mapping

import torch

from .arguments import positive
from .comfyui import add_folder, find_comfyui, measure_inside
from .inside.compiled import COMPILED, OURS, PLAIN
from .report import Bar, Report, machine, table
from .timing import Spread, ratios

MOST = 1.1
ROUNDS = 7
"""Timed rounds, unless told otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what this benchmark takes besides ``add_common``'s."""
    parser.add_argument("--steps", type=positive, default=4, help="sampling steps of a run")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    add_folder(parser)


def measure(arguments: argparse.Namespace) -> Report:
    """Measure what ``arguments`` ask for; see ``MEASURES``."""
    comfyui = find_comfyui(arguments.comfyui)
    names = ("device", "backend", "steps", "rounds")
    request = {name: getattr(arguments, name) for name in names}
    found = measure_inside(comfyui, "compiled", request)
    seconds = found["seconds"]
    against = {
        OURS: ratios(seconds[OURS], seconds[PLAIN]),
        OURS + COMPILED: ratios(seconds[OURS + COMPILED], seconds[PLAIN + COMPILED]),
    }
    gains = {
        name + COMPILED: ratios(seconds[name + COMPILED], seconds[name]) for name in (PLAIN, OURS)
    }
    device = torch.device(arguments.device)
    return Report(
        name="compiled",
        title=(
            f"compiled: demo model, {arguments.steps} steps in ComfyUI ({comfyui.name}), TorchCompileModel, "
            f"{arguments.backend}, {machine(device)}; median (low - high) of {arguments.rounds} rounds in turn"
        ),
        tables=[
            _table("a run, against plain rows alike", against),
            _table("a run, against the same uncompiled", gains),
        ],
        figures=found,
        bars=[
            Bar("compiled, against compiled plain rows", against[OURS + COMPILED].median, MOST),
            Bar("graphs for another reference and scale", found["more_graphs"], 0),
        ],
    )


def _table(what: str, against: Mapping[str, Spread]) -> str:
    return table((what, "ratio"), [(name, f"{ratio:.3f}") for name, ratio in against.items()])
