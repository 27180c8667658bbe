"""What a run tells while it goes on: progress bar, log, trackers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from .loop import Loop


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
        self.since = time.perf_counter()

    def count(self, loss: float, norm: Tensor | None) -> None:
        """Take in a step; every so many, write an entry."""
        loop, done = self.loop, self.loop.step + 1
        self.losses.append(loss)
        self.bar.update(1)
        if done % loop.config.log_every and done != loop.config.steps:
            return
        now = time.perf_counter()
        images_per_s = len(self.losses) * loop.trainer.global_batch / (now - self.since)
        values = {
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": loop.lr_schedule.get_last_lr()[0],
            "gradient_norm": 0.0 if norm is None else float(norm),
            "images_per_s": images_per_s,
        }
        self.losses, self.since = [], now
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {images_per_s:.2f} images/s")
        if loop.accelerator.is_main_process:
            loop.folder.log({"step": done, **values})
        loop.accelerator.log(values, step=done)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
