"""``dreamcache dataset encode``."""

from __future__ import annotations

from ..data.precomputed.encoding import EncodeOptions, encode_dataset


def run(options: EncodeOptions) -> None:
    """Encode a set and say where it lies."""
    print(encode_dataset(options))
