"""What a run will do and need, told before its first step."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

logger = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """The plan of a run; sizes in bytes.

    Attributes:
        num_parameters: That learn.
        num_samples: Samples of the training set.
        num_steps: Optimizer steps.
        global_batch: Samples of one of them, over all processes.
        num_processes: Processes that train.
        weights: Frozen base model, on each device.
        adapters: Adapters, gradients, the optimizer's moments and the average, on each device.
        activations: Kept between forward and backward pass, on each device.
        checkpoint: One checkpoint on disk.
        num_checkpoints: Kept at a time.
    """

    num_parameters: int
    num_samples: int
    num_steps: int
    global_batch: int
    num_processes: int
    weights: int
    adapters: int
    activations: int
    checkpoint: int
    num_checkpoints: int

    @property
    def memory(self) -> int:
        """Memory of a device, without temporary buffers."""
        return self.weights + self.adapters + self.activations

    @property
    def disk(self) -> int:
        """Room for all checkpoints and for one that is being written."""
        return self.checkpoint * (self.num_checkpoints + 1)

    def lines(self) -> list[str]:
        """The plan for people."""
        epochs = self.num_steps * self.global_batch / self.num_samples
        per_step = f"{self.global_batch} samples a step on {self.num_processes} process"
        return [
            f"trainable parameters: {self.num_parameters:,}",
            f"samples: {self.num_samples:,}",
            f"steps: {self.num_steps:,} ({per_step}{'es' if self.num_processes > 1 else ''}, {epochs:.1f} epochs)",
            f"memory of each device: about {self.memory / MIB:,.0f} MiB (base model {self.weights / MIB:,.0f}, adapters "
            f"with gradients and optimizer {self.adapters / MIB:,.0f}, activations {self.activations / MIB:,.0f}), and "
            "temporary buffers",
            f"disk: {self.disk / MIB:,.0f} MiB ({self.num_checkpoints} + 1 checkpoints of {self.checkpoint / MIB:,.0f})",
        ]

    def require_room(self, folder: Path, taken: int, free_memory: int | None) -> None:
        """Refuse a run whose checkpoints would not fit; warn of one whose step may not.

        Args:
            folder: Folder of the run; it need not exist.
            taken: Bytes of checkpoints that are there already and will be replaced.
            free_memory: Free bytes of the device, or ``None`` where unknown.

        Raises:
            InputError: The disk has too little room.
        """
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(nearest).free
        needed = max(self.disk - taken, self.checkpoint)
        if free < needed:
            raise InputError(
                f"The run needs {needed / MIB:,.0f} MiB for checkpoints in {folder}, and {free / MIB:,.0f} MiB are "
                "free there. Make room, lower keep_checkpoints, or give another --out."
            )
        if free_memory is not None and free_memory < self.memory:
            logger.warning(
                "A step needs about %.0f MiB, the device has %.0f MiB free. Where it runs out of memory, lower "
                "batch_size (and raise gradient_accumulation), or set gradient_checkpointing = true.",
                self.memory / MIB,
                free_memory / MIB,
            )
