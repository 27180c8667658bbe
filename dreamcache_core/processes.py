"""Several processes at one job."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from .errors import StateError
from .packages import require

MAX_WAIT = timedelta(days=30)
"""How long a process waits for the others; the default of minutes would end a long job."""


@contextmanager
def join(extra: str, *, cpu: bool = False) -> Iterator[Any]:
    """Work together with the other processes that the launcher has started, if there are any.

    Args:
        extra: Extra of this project that brings accelerate.
        cpu: Stay on the CPU.

    Yields:
        accelerate's ``PartialState`` of this process.

    Raises:
        MissingPackageError: accelerate is not installed.
        StateError: The launcher started processes that know nothing of each other.
    """
    with require("accelerate", extra):
        from accelerate import PartialState
    state: Any = PartialState(cpu=cpu, timeout=MAX_WAIT)
    require_all_processes(state.num_processes)
    try:
        yield state
    finally:
        state.destroy_process_group()


def require_all_processes(num_processes: int) -> None:
    """Refuse to run as one of several processes that know nothing of each other.

    Args:
        num_processes: Processes that accelerate says work together.

    Raises:
        StateError: The launcher started another number.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_processes:
        raise StateError(
            f"The launcher started {started} processes, but each of them works alone and would write the same files. "
            "On CPUs set ACCELERATE_USE_CPU=true; on GPUs run 'accelerate config', and start with 'accelerate launch'."
        )
