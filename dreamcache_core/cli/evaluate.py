"""``dreamcache evaluate dreambench``: by one process, or by several under ``accelerate launch``."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.dreambench.options import DreamBenchOptions
from ..names import printable
from ..processes import join


def run(options: DreamBenchOptions) -> None:
    """Judge the images, print their scores and say where the report lies."""
    from ..evaluation.dreambench.protocol import REPORT_FILE, evaluate_dreambench
    from ..evaluation.dreambench.results import overall_lines

    with join("eval", cpu=options.cpu) as state:
        results = evaluate_dreambench(options, state)
    if results is not None:
        print("\n".join(overall_lines(results)))
        print(printable(f"report: {Path(options.out) / REPORT_FILE}"))
