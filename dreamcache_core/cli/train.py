"""``dreamcache train``."""

from __future__ import annotations

from ..names import printable
from ..training.config import TrainConfig


def run(config: TrainConfig) -> None:
    """Print the plan, and train."""
    from ..training.loop import train
    from ..training.run import open_run

    opened = open_run(config)
    if opened.accelerator.is_main_process:
        print("\n".join(map(printable, opened.plan.lines())))
    if config.dry_run:
        opened.check()
        return
    finished = train(opened)
    if opened.accelerator.is_main_process:
        print(printable(str(finished)))
        print(
            "For ComfyUI, copy it into ComfyUI/models/dreamcache. From the shell: python -m dreamcache_core generate "
            + printable(
                f"--model {config.model} --adapters {finished} --reference IMAGE --mask MASK --prompt TEXT"
            )
        )
