"""``dreamcache evaluate dreambench``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..processes import join
from .flags import parse_config


def add_evaluate_commands(commands: Any) -> None:
    """Add ``evaluate`` and what follows it.

    Args:
        commands: The sub-parsers of the program.
    """
    text = "Measure how well images keep to their subject and prompt."
    parser = commands.add_parser("evaluate", help=text, description=text)
    inner = parser.add_subparsers(metavar="COMMAND", required=True)
    # the flags of these are the fields of a configuration, which has a parser of its own
    for name, run, text in (
        ("dreambench", _dreambench, "Judge images of DreamBench's subjects, or make them first."),
    ):
        inner.add_parser(name, help=text, add_help=False).set_defaults(run=run, takes_rest=True)


def _dreambench(argv: Sequence[str]) -> None:
    from ..evaluation.dreambench.options import DreamBenchOptions
    from ..evaluation.dreambench.protocol import REPORT_FILE, evaluate_dreambench
    from ..evaluation.dreambench.results import overall_lines

    options = parse_config(DreamBenchOptions, argv, program="dreamcache evaluate dreambench")
    with join("eval", cpu=options.cpu) as state:
        results = evaluate_dreambench(options, state)
    if results is not None:
        print("\n".join(overall_lines(results)))
        print(f"report: {Path(options.out) / REPORT_FILE}")
