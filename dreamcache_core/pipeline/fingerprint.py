"""Which base model it is, by its files."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

UNET_PARTS = ("unet", "scheduler")
"""Parts that adapters depend on."""

FINGERPRINT = "base_model_fingerprint"
"""Entry of the metadata of adapters."""

ENCODER_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""Parts that precomputed sets depend on."""

SAMPLED_BYTES, SAMPLED_EVERY = 2**16, 2**22
"""Of a file's contents so many bytes count, every so many bytes."""


def model_fingerprint(path: str | os.PathLike[str], parts: Sequence[str]) -> str:
    """Identify a model by its files: names, sizes, and samples of their bytes throughout.

    Args:
        path: diffusers folder, or single-file checkpoint.
        parts: Sub-folders that count (``unet``, ``vae``, ...); without meaning for a single file.

    Returns:
        SHA-256 as hexadecimal text.
    """
    root, digest = Path(path), hashlib.sha256()
    for file in sorted(_files(root, parts)):
        size = file.stat().st_size
        name = file.relative_to(root).as_posix() if root.is_dir() else ""
        digest.update(f"{name}:{size}:".encode())
        with file.open("rb") as stream:
            for start in (*range(0, size, SAMPLED_EVERY), max(0, size - SAMPLED_BYTES)):
                stream.seek(start)
                digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()


def _files(root: Path, parts: Sequence[str]) -> Iterator[Path]:
    if root.is_file():
        yield root
    for part in parts:
        yield from (file for file in (root / part).rglob("*") if file.is_file())
