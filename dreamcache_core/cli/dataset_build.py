"""``dreamcache dataset build``: a synthetic training set, by one process or by several under ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.synthetic.building import build, summarise
from ..data.synthetic.options import BuildOptions
from ..processes import join
from .flags import parse_config


def run(argv: Sequence[str]) -> None:
    """Build a set and say how many samples were kept, and why others were not.

    Args:
        argv: Arguments after ``dataset build``.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
        OSError: The disk is full; what is finished stays.
    """
    options = parse_config(BuildOptions, argv, program="dreamcache dataset build")
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
