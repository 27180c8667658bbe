"""``dreamcache train``."""

from __future__ import annotations

import sys

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
        config_of_file = f" --config {config.model_config}" if config.model_config else ""
        print(
            "For ComfyUI, copy it into ComfyUI/models/dreamcache. From the shell, with --mask MASK where the image has a "
            "background: "
            + printable(
                f"{sys.executable} -m dreamcache_core generate --model {config.model}{config_of_file} --adapters {finished} "
                "--reference IMAGE --prompt TEXT --out results"
            )
        )
