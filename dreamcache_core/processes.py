"""Several processes at one job, and signals that end it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

from .errors import StateError
from .packages import require

MAX_WAIT = timedelta(days=30)
"""How long a process waits for the others; the default of minutes would end a long job."""


@contextmanager
def join(extra: str, *, cpu: bool = False) -> Iterator[Any]:
    """Work together with the other processes that the launcher has started, if there are any.

    Args:
        extra: Extra of this project that brings accelerate.
        cpu: Stay on the CPU; so does ``ACCELERATE_USE_CPU``.

    Yields:
        accelerate's ``PartialState`` of this process.

    Raises:
        MissingPackageError: accelerate is not installed.
        StateError: The launcher started processes that know nothing of each other.
    """
    with require("accelerate", extra):
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env
    # of accelerate's states only that of training looks there by itself
    on_cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    state: Any = PartialState(cpu=on_cpu, timeout=MAX_WAIT)
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


def require_shared_folder(folder: Path, processes: Any) -> None:
    """Make a folder that all processes write to; refuse one that some of them do not see.

    All processes call it.

    Args:
        folder: The folder; need not exist.
        processes: accelerate's ``PartialState`` or ``Accelerator`` of this process.

    Raises:
        StateError: On another machine the folder is another one; raised by all processes.
        OSError: It cannot be made.
    """
    if processes.num_processes == 1:
        return
    from accelerate.utils import broadcast_object_list, gather_object

    mark = folder / f".{uuid4().hex}"
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    (name,) = broadcast_object_list([mark.name])
    is_seen = folder.is_dir() and name in os.listdir(folder)
    blind = [number for number, sees in enumerate(gather_object([is_seen])) if not sees]
    if processes.is_main_process:
        mark.unlink()
    if blind:
        raise StateError(
            f"Processes {', '.join(map(str, blind))} of {processes.num_processes} do not see what process 0 writes to {folder}. "
            "Give all machines the same folder, on a shared file system."
        )


SIGNALS = (signal.SIGINT, signal.SIGTERM)

STOPPING = b"\nstopping as soon as all is saved; Ctrl-C once more stops at once\n"


class Interruption:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self.is_requested = False

    def request(self, number: int, _: FrameType | None) -> None:
        """Ask once; a second Ctrl-C stops at once."""
        if self.is_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_requested = True
        os.write(2, STOPPING)  # print may be what was interrupted


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
