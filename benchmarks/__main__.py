"""``python -m benchmarks NAME``; ``all`` runs every one of generation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dreamcache_core import DreamCacheError

from . import compiled, encode, gpu, growth, load, memory, paper, run, step, training
from .arguments import add_common, add_model
from .models import SDXL, UNETS
from .report import Report, publish

MEASURES = {
    "step": step,
    "encode": encode,
    "memory": memory,
    "growth": growth,
    "load": load,
    "run": run,
    "compiled": compiled,
    "paper": paper,
}
"""Modules with ``ROUNDS`` and ``measure(arguments) -> Report``, which raises ``InputError`` on what cannot be measured."""

OWN_COMMANDS = {"training": training, "gpu": gpu}
"""Modules with ``run(arguments)``, which prints and returns the exit status itself."""

FULL_SIZE = ("step", "encode", "memory")
"""What ``all`` also measures at SD 2.1 size on the CPU; the others take a GPU there."""

DEMO_MODEL = ("compiled",)
"""What measures the demo model, which has one size and float type."""

ON_PAPER = ("paper",)
"""What ``all`` counts at SDXL's size, as it computes nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark, or all.

    Args:
        argv: Arguments; ``None``: those of the process.

    Returns:
        Exit status: 0 where what is expected holds, 1 where it does not, 2 on bad input.
    """
    arguments = _parser().parse_args(argv)
    try:
        if arguments.name in OWN_COMMANDS:
            return OWN_COMMANDS[arguments.name].run(arguments)
        if arguments.name == "all":
            return _run_all(arguments)
        return publish(MEASURES[arguments.name].measure(arguments), arguments.out)
    except DreamCacheError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in {**MEASURES, **OWN_COMMANDS}.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        if name in MEASURES:
            add_common(command, module.ROUNDS)
            if name not in DEMO_MODEL:
                add_model(command)
        if hasattr(module, "add_arguments"):
            module.add_arguments(command)
    summary = "All of them but training and gpu, small; step, encode and memory at SD 2.1 size too; on paper SDXL's."
    everything = commands.add_parser("all", help=summary, description=summary)
    everything.add_argument("--out", type=Path, metavar="DIR", help="folder for JSON and plots")
    everything.add_argument("--size", choices=UNETS, default="small", help="size of the first part")
    everything.add_argument(
        "--full", default="sd21", help="size of the full-size part; empty: leave it out"
    )
    return parser


def _run_all(arguments: argparse.Namespace) -> int:
    """Run everything, then say which bars were missed."""
    parts = [(name, arguments.size, "float32") for name in MEASURES if name not in ON_PAPER]
    if arguments.full:
        parts += [(name, arguments.full, "float32") for name in FULL_SIZE]
        parts += [(name, SDXL, "float16") for name in ON_PAPER]
    reports: list[tuple[str, Report]] = []
    unmeasured: list[str] = []
    for name, size, dtype in parts:
        has_size = name not in DEMO_MODEL
        label = f"{name} ({size})" if has_size else name
        flags = ["--size", size, "--dtype", dtype] if has_size else []
        flags += ["--out", str(arguments.out / size)] if arguments.out else []
        chosen = _parser().parse_args([name, *flags])
        try:
            reports.append((label, MEASURES[name].measure(chosen)))
        except DreamCacheError as error:
            # the others need none of what this one lacks
            unmeasured.append(label)
            print(f"{label} is not measured: {error}\n", file=sys.stderr)
            continue
        publish(reports[-1][1], chosen.out)
        print()
    bars = [bar for _, report in reports for bar in report.bars]
    missed = [
        f"{name}: {bar.what}" for name, report in reports for bar in report.bars if not bar.holds
    ]
    says = f"missed: {'; '.join(missed)}" if missed else "none missed"
    if unmeasured:
        says += f"; not measured: {', '.join(unmeasured)}"
    print(f"All benchmarks: {len(bars) - len(missed)} of {len(bars)} bars hold; {says}.")
    return 1 if missed or unmeasured else 0


if __name__ == "__main__":
    sys.exit(main())
