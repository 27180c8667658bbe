"""Images per second of the trainer against a plain loop written as METHOD.md section 7 reads.

``python -m benchmarks training`` runs, in turn on the same samples and in one process:

- the plain loop (``textbook.py``): images and captions encoded at each step, a complete pass of the U-Net over the
  references, keys and values in the graph;
- this trainer on images, which it encodes at each step; its pass over the references stops at the last cached layer;
- this trainer on a precomputed set with references on the fly (``dataset encode`` as it comes);
- this trainer on a precomputed set with references (``dataset encode --reference_variants``).

A step is everything from a batch on the device to the optimizer's step. Reading the batch is left out, since worker
processes do it meanwhile; its time is printed by itself. The ratios depend on what VAE, text encoder and U-Net cost in
relation to each other: the size ``small`` keeps the proportions of SD 2.1 in floating-point operations (see
``models.SIZES``). The bound is the ratio of the counted operations: what the ratio would be if all of them took equally
long.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dreamcache_core.training.plan import SavedBytes

from .arguments import positive, require_device
from .flops import count_flops
from .models import SIZES
from .report import machine, table
from .timing import Spread, Stopwatch, alternate, ratios
from .training_runs import IMAGES, MIXED_PRECISION, PLAIN, PRECOMPUTED, Runs, Settings

EXPECTED_RATIO = 1.3
"""Images per second with everything precomputed, the plain loop = 1."""

PHASES = ("VAE", "text", "reference", "forward", "backward", "rest")
PHASE_STEPS = 2


@dataclass(frozen=True)
class Result:
    """One loop's figures.

    Attributes:
        images_per_s: Images per second.
        ratio: The plain loop's seconds over this one's, by round.
        flops: Counted floating-point operations of a step.
        bound: The plain loop's operations over this one's.
        phases_s: Seconds of a step by phase.
    """

    images_per_s: Spread
    ratio: Spread
    flops: int
    bound: float
    phases_s: Mapping[str, float]


@dataclass(frozen=True)
class Memory:
    """What one step of the trainer keeps for its backward pass.

    Attributes:
        saved_bytes: Bytes that autograd keeps, without weights.
        peak_bytes: Highest allocation on the GPU during the step, weights included; ``None`` on the CPU.
    """

    saved_bytes: int
    peak_bytes: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's arguments."""
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the base model")
    parser.add_argument("--batch", type=positive, default=2, help="images per step")
    parser.add_argument("--steps", type=positive, default=5, help="timed steps of each loop")
    parser.add_argument(
        "--resolution", type=positive, help="side of the images; else the size's own"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=MIXED_PRECISION, default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and compare with what is expected.

    Args:
        arguments: As declared by ``add_arguments``.

    Returns:
        Exit status: 0 where the expected ratio is reached.

    Raises:
        InputError: The device is not there.
    """
    given = arguments
    resolution = given.resolution or SIZES[given.size].resolution
    settings = Settings(given.size, given.batch, given.steps, given.dtype, resolution)
    require_device(given.device)
    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate's own switch; it takes a GPU else
    with tempfile.TemporaryDirectory(prefix="dreamcache-") as folder:
        runs = Runs(settings, Path(folder))
        results, memory = measure(runs, settings), measure_memory(runs)
        _print(settings, runs, results, memory)
    ratio = results[PRECOMPUTED].ratio.median
    is_reached = ratio >= EXPECTED_RATIO
    if given.json is not None:
        given.json.write_text(_as_json(settings, runs, results, memory), encoding="utf-8")
    print(
        f"\nWith everything precomputed {ratio:.2f} times the plain loop; expected {EXPECTED_RATIO} or more: "
        f"{'holds' if is_reached else 'missed'}."
    )
    return 0 if is_reached else 1


def measure(runs: Runs, settings: Settings) -> dict[str, Result]:
    """Time all loops in turn, then count their operations and time their phases.

    Args:
        runs: The loops.
        settings: Batch size and number of steps.

    Returns:
        Figures by the loops' names.
    """
    steps = runs.steps()
    seconds = alternate(steps, settings.steps, runs.device)
    flops = {name: count_flops(step) for name, step in steps.items()}
    return {
        name: Result(
            images_per_s=Spread.of([settings.batch / s for s in seconds[name]]),
            ratio=ratios(seconds[PLAIN], seconds[name]),
            flops=flops[name],
            bound=flops[PLAIN] / flops[name],
            phases_s=_phases(runs, name),
        )
        for name in steps
    }


def _phases(runs: Runs, name: str) -> dict[str, float]:
    step, stopwatch = runs.steps()[name], Stopwatch(runs.device)
    with runs.watching(name, stopwatch):
        for _ in range(PHASE_STEPS):
            with stopwatch.phase("rest"):
                step()
    return {phase: stopwatch.seconds.get(phase, 0.0) / PHASE_STEPS for phase in PHASES}


def measure_memory(runs: Runs) -> dict[str, Memory]:
    """Compare a step as it is with one whose encoder half is part of the autograd graph.

    Args:
        runs: The loops.

    Returns:
        Figures by the name of what was measured.
    """
    batch = runs.batches[PRECOMPUTED][0]
    # noise that wants a gradient puts everything computed from it into the graph
    tracked = {**batch, "noise": batch["noise"].clone().requires_grad_()}
    return {
        "encoder half without a graph": _memory(runs, batch),
        "encoder half in the graph": _memory(runs, tracked),
    }


def _memory(runs: Runs, batch: Mapping[str, Any]) -> Memory:
    module, loop = runs.trainer.module, runs.loop
    weights = [*module.unet.parameters(), *module.parameters()]
    saved = SavedBytes(weights)
    with module.until_backward(), saved.counting():
        loop.loss(batch)
    total = saved.total
    del saved
    if runs.device.type != "cuda":
        return Memory(total, None)
    torch.cuda.reset_peak_memory_stats(runs.device)
    with module.until_backward():
        loop.accelerator.backward(loop.loss(batch))
    loop.optimizer.zero_grad()
    return Memory(total, torch.cuda.max_memory_allocated(runs.device))


def _print(
    settings: Settings, runs: Runs, results: Mapping[str, Result], memory: Mapping[str, Memory]
) -> None:
    print(
        f"training: {settings.size} size, batch {settings.batch}, {settings.resolution} x {settings.resolution} "
        f"pixels, {settings.dtype}, {machine(runs.device)}; median (low - high) of {settings.steps} steps in turn\n"
    )
    print(_speed_table(results), _phase_table(results), _memory_table(memory), sep="\n\n")
    reading = runs.reading_s
    print(
        f"\nReading a batch, not part of the above: {reading[IMAGES]:.3f} s from images, "
        f"{reading[PRECOMPUTED]:.3f} s precomputed."
    )


def _speed_table(results: Mapping[str, Result]) -> str:
    header = ("", "images/s", "plain loop = 1", "TFLOP a step", "counted bound")
    rows = [
        (name, f"{r.images_per_s:.3g}", f"{r.ratio:.2f}", f"{r.flops / 1e12:.4f}", f"{r.bound:.2f}")
        for name, r in results.items()
    ]
    return table(header, rows)


def _phase_table(results: Mapping[str, Result]) -> str:
    rows: list[list[str]] = []
    for name, result in results.items():
        total = sum(result.phases_s.values())
        parts = [result.phases_s[phase] for phase in PHASES]
        rows.append([name, *(f"{s:.3f} ({s / total:4.0%})" for s in parts), f"{total:.3f}"])
    return table(("seconds of a step", *PHASES, "all"), rows)


def _memory_table(memory: Mapping[str, Memory]) -> str:
    mib = 2**20
    rows = [
        (
            name,
            f"{m.saved_bytes / mib:.1f} MiB",
            "-" if m.peak_bytes is None else f"{m.peak_bytes / mib:.1f} MiB",
        )
        for name, m in memory.items()
    ]
    return table(("memory of a trainer's step", "kept for backward", "peak on the GPU"), rows)


def _as_json(
    settings: Settings, runs: Runs, results: Mapping[str, Result], memory: Mapping[str, Memory]
) -> str:
    figures = {
        "settings": asdict(settings),
        "machine": machine(runs.device),
        "torch": torch.__version__,
        "loops": {name: asdict(result) for name, result in results.items()},
        "memory": {name: asdict(entry) for name, entry in memory.items()},
        "reading_s": runs.reading_s,
    }
    return json.dumps(figures, indent=2)
