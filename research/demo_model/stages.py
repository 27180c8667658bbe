"""The loop in which each part of the demo's base model is trained: resumable, averaged, logged."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dreamcache_core.files.jsonl import append_lines
from dreamcache_core.processes import catch_signals
from dreamcache_core.training.checkpoints import Checkpoints, cut_log

KEPT_CHECKPOINTS = 2
LOG_EVERY = 50


class Stage(Protocol):
    """One part to train.

    Attributes:
        name: Name of its files.
        module: What learns.
    """

    name: str
    module: nn.Module

    def loss(self, module: nn.Module, random: np.random.Generator) -> Tensor:
        """Draw a batch and return its loss, a scalar.

        Args:
            module: ``self.module`` as Accelerate wrapped it.
            random: Source of everything random in this step.
        """
        ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage learns.

    Attributes:
        steps: Optimizer steps in all.
        learning_rate: AdamW's, reached after the warm-up, falling to zero by a cosine.
        warmup_steps: Steps of the warm-up.
        ema_decay: Decay of the moving average, which is what the stage returns.
        save_every: Steps between checkpoints.
        seed: Decides every batch.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    ema_decay: float
    save_every: int
    seed: int


def train_stage(stage: Stage, schedule: Schedule, folder: Path, mixed_precision: str) -> bool:
    """Train one part, going on from its newest checkpoint; its module ends up holding the moving average.

    Args:
        stage: The part.
        schedule: How long and how fast.
        folder: Where checkpoints and the log go.
        mixed_precision: Accelerate's: ``no``, ``fp16`` or ``bf16``.

    Returns:
        Whether it reached its last step; False after an interrupt, which saves first.
    """
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    accelerator = Accelerator(mixed_precision=mixed_precision)
    optimizer, cosine = _optimizer(stage.module, schedule)
    average = EMAModel(stage.module.parameters(), decay=schedule.ema_decay, foreach=True)
    module, optimizer, cosine = accelerator.prepare(stage.module, optimizer, cosine)
    average.to(accelerator.device)
    accelerator.register_for_checkpointing(average)
    log, checkpoints = folder / "log.jsonl", Checkpoints(folder, KEPT_CHECKPOINTS)
    folder.mkdir(parents=True, exist_ok=True)
    step = _resume(accelerator, checkpoints, log)
    losses: list[float] = []
    began = time.monotonic()
    with (
        catch_signals() as interruption,
        tqdm(total=schedule.steps, initial=step, desc=stage.name, mininterval=5) as bar,
    ):
        while step < schedule.steps and not interruption.is_requested:
            with accelerator.autocast():
                loss = stage.loss(module, np.random.default_rng((schedule.seed, step)))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(stage.module.parameters(), 1.0)
            optimizer.step()
            cosine.step()
            optimizer.zero_grad()
            average.step(stage.module.parameters())
            step += 1
            bar.update()
            losses.append(loss.item())
            if step % LOG_EVERY == 0:
                _log(log, step, losses, time.monotonic() - began)
                losses.clear()
            if (
                step % schedule.save_every == 0
                or step == schedule.steps
                or interruption.is_requested
            ):
                with checkpoints.new(step, accelerator) as checkpoint:
                    accelerator.save_state(str(checkpoint))
    average.copy_to(stage.module.parameters())
    return step == schedule.steps


def _optimizer(module: nn.Module, schedule: Schedule) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and its learning rate: a warm-up, then a cosine down to zero."""
    from diffusers.optimization import get_scheduler

    # fused: one kernel for all weights, which saves a fifth of a step on the CPU
    optimizer = torch.optim.AdamW(module.parameters(), lr=schedule.learning_rate, fused=True)
    cosine = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=schedule.warmup_steps,
        num_training_steps=schedule.steps,
    )
    return optimizer, cosine


def _log(log: Path, step: int, losses: list[float], seconds: float) -> None:
    mean = sum(losses) / len(losses)
    append_lines(log, [{"step": step, "loss": round(mean, 6), "seconds": round(seconds)}])


def _resume(accelerator: Any, checkpoints: Checkpoints, log: Path) -> int:
    newest = checkpoints.newest()
    if newest is None:
        return 0
    accelerator.load_state(str(newest.path))
    cut_log(log, newest.step)
    return newest.step
