"""Several processes at one job, and signals that end it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
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


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self.is_requested = False

    def request(self, number: int, _: FrameType | None) -> None:
        """Ask once; a second Ctrl-C stops at once."""
        if self.is_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_requested = True


@contextmanager
def catch_signals() -> Iterator[Interruption]:
    """Turn Ctrl-C and SIGTERM into requests, so that a job can save before it ends.

    Yields:
        The request; outside the main thread, where signals cannot be caught, it is never made.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption.request) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(_: int) -> None:
    """Let a data loader's worker live until the loader ends it (its ``worker_init_fn``)."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
