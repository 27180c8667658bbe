"""What a run tells while it goes on: progress bar, log, trackers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

if TYPE_CHECKING:
    from .loop import Loop


class TakenStep(NamedTuple):
    """One optimizer step: mean loss over all processes, norm of its gradients before clipping, learning rate."""

    loss: float
    gradient_norm: float
    learning_rate: float


class Meter:
    """Progress bar, log and trackers."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.losses = loop, list[float]()
        self.bar = tqdm(
            total=loop.config.steps,
            initial=loop.step,
            unit="step",
            desc="training",
            disable=not loop.accelerator.is_main_process,
        )
        self.busy_s, self.since = 0.0, time.perf_counter()

    def resume(self) -> None:
        """Begin to time a step: what was done since the last one (validation, checkpoint) is left out."""
        self.since = time.perf_counter()

    def count(self, taken: TakenStep) -> None:
        """Take in a step; every so many, write an entry."""
        loop, done = self.loop, self.loop.step
        self.losses.append(taken.loss)
        self.busy_s += time.perf_counter() - self.since
        self.bar.update(1)
        if done % loop.config.log_every and done != loop.config.steps:
            return
        images_per_s = len(self.losses) * loop.trainer.global_batch / self.busy_s
        values = {
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": taken.learning_rate,
            "gradient_norm": taken.gradient_norm,
            "images_per_s": images_per_s,
        }
        self.losses, self.busy_s = [], 0.0
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {images_per_s:.2f} images/s")
        if loop.accelerator.is_main_process:
            loop.folder.log({"step": done, **values})
        loop.accelerator.log(values, step=done)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
