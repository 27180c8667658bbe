"""``dreamcache dataset build``: by one process, or by several under ``accelerate launch``."""

from __future__ import annotations

from ..data.synthetic.building import build, summarise
from ..data.synthetic.options import BuildOptions
from ..processes import join


def run(options: BuildOptions) -> None:
    """Build a set and say how many samples were kept, and why others were not."""
    with join("train", cpu=options.cpu) as state:
        build(
            options,
            process_index=state.process_index,
            num_processes=state.num_processes,
            device=state.device,
            has_bar=state.is_local_main_process,
        )
        state.wait_for_everyone()
        if state.is_main_process:
            print(summarise(options))
