"""``dreamcache dataset build | encode | masks | shard``; the fifth is in ``dataset_check``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..data.masking import MaskOptions, make_masks
from ..data.packing import write_shards
from ..data.precomputed.encoding import EncodeOptions, encode_dataset
from ..data.sources.opening import open_source
from ..data.synthetic.building import build, summarise
from ..data.synthetic.options import BuildOptions
from ..errors import InputError
from ..names import printable
from ..processes import join, require_shared_folder


def run_build(options: BuildOptions) -> None:
    """Build a set, as one process of several, and say how many samples were kept, and why others were not."""
    with join("train", cpu=options.cpu) as state:
        require_shared_folder(Path(options.out), state)
        build(
            options,
            process_index=state.process_index,
            num_processes=state.num_processes,
            device=state.device,
            has_bar=state.is_local_main_process,
        )
        state.wait_for_everyone()
        if state.is_main_process:
            summary = summarise(options)
            print(summary)
            if not summary.kept:
                raise InputError(
                    f"None of {summary.count} samples was kept in {options.out}. Loosen the limits that reject them, see "
                    "--help; --rejected FOLDER keeps what is rejected, with its masks, to look at."
                )


def run_masks(options: MaskOptions) -> None:
    """Make masks, as one process of several, and say what became of the images."""
    with join("train", cpu=options.cpu) as state:
        from accelerate.utils import gather_object

        counts = make_masks(
            options,
            process_index=state.process_index,
            num_processes=state.num_processes,
            device=state.device,
            has_bar=state.is_local_main_process,
        )
        total = sum(gather_object([counts]), Counter[str]())
        if state.is_main_process:
            print("\n".join(f"{count:>8}  {outcome}" for outcome, count in total.items()))
            print(printable(f"Look at the masks: dreamcache dataset check {options.path}"))


def run_encode(options: EncodeOptions) -> None:
    """Encode a set and say where it lies."""
    print(printable(str(encode_dataset(options))))


@dataclass(frozen=True)
class ShardOptions(Config):
    """Pack a training set into WebDataset shards.

    Attributes:
        path: Training set: folder, manifest, shards or parquet.
        out: Folder for the shards, empty or new.
        caption: Caption of images that have none.
        max_count: Most pairs to a shard.
    """

    path: str
    out: str
    caption: str | None = None
    max_count: int = 1000


def run_shard(options: ShardOptions) -> None:
    """Write the shards and say how many there are."""
    source = open_source(options.path, options.caption)
    shards = write_shards(source, options.out, max_count=options.max_count, has_bar=True)
    print(printable(f"{len(source.keys)} pairs in {len(shards)} shards: {options.out}"))
