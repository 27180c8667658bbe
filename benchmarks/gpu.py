"""What docs/performance.md leaves open without a GPU: each part in a process of its own, within one limit of time."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .arguments import positive, require_device
from .models import SDXL, SIZES

PACK = Path(__file__).parents[1]
FULL = "full"


@dataclass(frozen=True)
class Part:
    """One call of one benchmark.

    Attributes:
        benchmark: Its name.
        size: Size of the model.
        dtype: Float type.
        flags: Further flags.
        limit_s: Most seconds it may take.
    """

    benchmark: str
    size: str
    dtype: str
    flags: tuple[str, ...] = ()
    limit_s: int = 120

    @property
    def name(self) -> str:
        """Name of its folder."""
        compiled = ["compiled"] if "--compile" in self.flags else []
        return "-".join((self.benchmark, self.size, self.dtype, *compiled))


MANY_ROUNDS = ("--rounds", "20")
PARTS = (
    Part("step", "sd21", "float16", MANY_ROUNDS),
    Part("step", "sd21", "bfloat16", MANY_ROUNDS),
    Part("step", SDXL, "float16", MANY_ROUNDS),
    Part("memory", "sd21", "float16"),
    Part("memory", SDXL, "float16"),
    Part("training", "sd21", "bfloat16", ("--batch", "8"), limit_s=180),
    Part("growth", "sd21", "float16", ("--rounds", "10")),
    Part("encode", "sd21", "float16", MANY_ROUNDS),
    Part("step", "sd21", "float16", (*MANY_ROUNDS, "--compile", "inductor"), limit_s=240),
    Part("run", "sd15", "float16", ("--steps", "20")),
)
"""What matters most comes first, as the last may have no time left."""


@dataclass(frozen=True)
class Result:
    """What became of a part.

    Attributes:
        part: Its name.
        command: The command line, without the interpreter.
        seconds: How long it took, start included.
        outcome: Whether it was measured and its bars hold; else why not.
        tables: What it printed.
        figures: Its JSON; empty where it was not measured.
    """

    part: str
    command: str
    seconds: float
    outcome: str
    tables: str
    figures: Mapping[str, Any]


MEASURED = ("holds", "a bar is missed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--size", choices=(FULL, *SIZES), default=FULL, help=f"of all parts; {FULL}: each its own"
    )
    parser.add_argument("--limit", type=positive, default=570, help="seconds for all parts")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("bench/gpu"), help="folder for the results"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the parts and write ``summary.md`` and ``summary.json`` after each of them.

    Args:
        arguments: As declared by ``add_arguments``.

    Returns:
        Exit status: 0 where every part was measured and all bars hold.

    Raises:
        InputError: The device is not there.
    """
    require_device(arguments.device)
    parts = PARTS
    if arguments.size != FULL:
        parts = [replace(part, size=arguments.size) for part in PARTS]
    arguments.out.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + arguments.limit, list[Result]()
    for part in {part.name: part for part in parts}.values():
        results.append(_measure(part, arguments, end - time.monotonic()))
        print(
            f"{results[-1].part}: {results[-1].outcome} ({results[-1].seconds:.0f} s)", flush=True
        )
        _write(arguments.out, results)
    print(f"\nTables: {arguments.out / 'summary.md'}")
    return 0 if all(result.outcome == MEASURED[0] for result in results) else 1


def _measure(part: Part, arguments: argparse.Namespace, left_s: float) -> Result:
    """Run a part, and stop it with all that it has started when its time is over."""
    folder = (arguments.out / part.name).resolve()
    file = folder / f"{part.benchmark}.json"
    out = ("--json", str(file)) if part.benchmark == "training" else ("--out", str(folder))
    flags = ("--size", part.size, "--dtype", part.dtype, "--device", arguments.device, *part.flags)
    command = ["-m", "benchmarks", part.benchmark, *flags]
    if left_s <= 0:
        return Result(part.name, " ".join(command), 0.0, "skipped: no time left", "", {})
    folder.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    began, limit = time.monotonic(), min(left_s, part.limit_s)
    with (folder / "tables.txt").open("w") as tables, (folder / "errors.txt").open("w") as errors:
        status, started = None, [sys.executable, *command, *out]
        with subprocess.Popen(
            started, cwd=PACK, stdout=tables, stderr=errors, start_new_session=True
        ) as process:
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if status is None:
        outcome = f"cut off after {limit:.0f} s"
    elif not figures:
        last = (folder / "errors.txt").read_text().strip().splitlines()[-1:]
        outcome = f"not measured: {''.join(last) or f'exit status {status}'}"
    else:
        outcome = MEASURED[status != 0]
    said = (folder / "tables.txt").read_text()
    return Result(part.name, " ".join(command), time.monotonic() - began, outcome, said, figures)


def _write(out: Path, results: Sequence[Result]) -> None:
    content = {"torch": torch.__version__, "parts": [asdict(result) for result in results]}
    (out / "summary.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    rows = [(r.part, f"{r.seconds:.0f}", r.outcome) for r in results]
    lines = [
        f"# Measured with torch {torch.__version__}",
        "",
        "| part | s | result |",
        "|---|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    for result in results:
        if result.tables:
            lines += ["", f"## {result.part}", "", f"    python {result.command}", ""]
            lines += ["```text", result.tables.strip(), "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
