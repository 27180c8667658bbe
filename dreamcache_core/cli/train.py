"""``dreamcache train``."""

from collections.abc import Sequence

from ..training.config import TrainConfig
from .flags import parse_config


def run(argv: Sequence[str]) -> None:
    """Train adapters.

    Args:
        argv: Arguments after ``train``.
    """
    config = parse_config(TrainConfig, argv, program="dreamcache train")
    from ..training.trainer import Trainer

    trainer = Trainer(config)
    if trainer.accelerator.is_main_process:
        print("\n".join(trainer.plan.lines()))
    if config.dry_run:
        return
    finished = trainer.run()
    if trainer.accelerator.is_main_process:
        print(finished)
