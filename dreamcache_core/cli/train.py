"""``dreamcache train``."""

from __future__ import annotations

from ..training.config import TrainConfig


def run(config: TrainConfig) -> None:
    """Print the plan, and train."""
    from ..training.trainer import Trainer

    trainer = Trainer(config)
    if trainer.accelerator.is_main_process:
        print("\n".join(trainer.plan.lines()))
    if config.dry_run:
        return
    finished = trainer.run()
    if trainer.accelerator.is_main_process:
        print(finished)
