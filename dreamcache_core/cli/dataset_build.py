"""``dreamcache dataset build``: a synthetic training set, by one process or by several under ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from ..data.synthetic.building import build, summarise
from ..data.synthetic.options import BuildOptions
from ..errors import MissingPackageError
from ..processes import require_all_processes
from .flags import parse_config

MAX_WAIT = timedelta(days=30)
"""How long a process waits for the last one; the default of minutes would end a long build."""


def run(argv: Sequence[str]) -> None:
    """Build a set and say how many samples were kept, and why others were not.

    Args:
        argv: Arguments after ``dataset build``.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
        OSError: The disk is full; what is finished stays.
    """
    options = parse_config(BuildOptions, argv, program="dreamcache dataset build")
    state = _process_state(options.cpu)
    require_all_processes(state.num_processes)
    build(
        options,
        process_index=state.process_index,
        num_processes=state.num_processes,
        device=state.device,
        has_bar=state.is_local_main_process,
    )
    state.wait_for_everyone()
    if state.is_main_process:
        print(summarise(options))
    state.destroy_process_group()


def _process_state(cpu: bool) -> Any:
    """Join the other processes, if there are any."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingPackageError(
            f"Building a set needs accelerate ({error}). Install it: pip install 'dreamcache[train]'."
        ) from error
    return PartialState(cpu=cpu, timeout=MAX_WAIT)
