"""``dreamcache evaluate dreambench``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..errors import MissingPackageError
from ..processes import require_all_processes
from .flags import parse_config

MAX_WAIT = timedelta(days=30)
"""How long a process waits for the last one; the default of minutes would end a long evaluation."""


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
    state = _process_state(options.cpu)
    require_all_processes(state.num_processes)
    results = evaluate_dreambench(options, state)
    if results is not None:
        print("\n".join(overall_lines(results)))
        print(f"report: {Path(options.out) / REPORT_FILE}")
    state.destroy_process_group()


def _process_state(cpu: bool) -> Any:
    """Join the other processes, if there are any."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingPackageError(
            f"Evaluation needs accelerate ({error}). Install it: pip install 'dreamcache[eval]'."
        ) from error
    return PartialState(cpu=cpu, timeout=MAX_WAIT)
