"""A step with a reference under ComfyUI's TorchCompileModel: its time against plain rows, and what is compiled anew."""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from dreamcache_core.errors import InputError

from .arguments import positive
from .inside_compiled import COMPILED, OURS, PLAIN
from .report import Bar, Report, machine, table
from .run import _find_comfyui
from .timing import Spread, ratios

INSIDE = Path(__file__).with_name("inside_compiled.py")
MOST = 1.1
ROUNDS = 7
"""Timed rounds, unless told otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what this benchmark takes besides ``add_common``'s, of which it heeds ``--device`` and ``--rounds``."""
    parser.add_argument("--steps", type=positive, default=4, help="sampling steps of a run")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--comfyui", type=Path, help="ComfyUI's folder; else COMFYUI_PATH's first, else ~/ComfyUI"
    )


def measure(arguments: argparse.Namespace) -> Report:
    """Measure what ``arguments`` ask for; see ``MEASURES``."""
    comfyui = _find_comfyui(arguments.comfyui)
    request = {
        "comfyui": str(comfyui),
        **{name: getattr(arguments, name) for name in ("device", "backend", "steps", "rounds")},
    }
    own = comfyui / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else "python3"
    done = subprocess.run(
        [python, str(INSIDE), json.dumps(request)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise InputError(f"The measurement inside {comfyui} ended with {done.returncode}.")
    found = json.loads(done.stdout.strip().splitlines()[-1])
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
