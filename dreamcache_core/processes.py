"""Several processes at one job."""

import os

from .errors import StateError


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
