"""``dreamcache dataset shard``."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from ..data.packing import write_shards
from ..data.sources.opening import open_source


@dataclass(frozen=True)
class ShardOptions(Config):
    """Pack a training set into WebDataset shards.

    Attributes:
        path: Training set: folder, manifest, shards or parquet.
        out: Folder for the shards, empty or new.
        max_count: Most pairs to a shard.
    """

    path: str
    out: str
    max_count: int = 1000


def run(options: ShardOptions) -> None:
    """Write the shards and say how many there are."""
    source = open_source(options.path)
    shards = write_shards(source, options.out, max_count=options.max_count, has_bar=True)
    print(f"{len(source.keys)} pairs in {len(shards)} shards: {options.out}")
