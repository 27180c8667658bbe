"""``dreamcache convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..config import Config
from ..errors import InputError
from ..files.tensor_file import FORMAT_KEY, read_header
from ..method.adapter import AdapterSet
from ..method.adapter_files import load_adapters, save_adapters
from ..names import printable
from ..pipeline.loading import DTYPES


@dataclass(frozen=True)
class ConvertOptions(Config):
    """Turn released adapters into our format.

    Attributes:
        source: Adapter file (released .pt, or our format).
        target: The .safetensors file to write.
        family: Family of a released file: sd15, sd21 (assumed), custom-<width>.
        dtype: Float type of the target; else that of the source.
        force: Replace the target if it exists.
    """

    source: str
    target: str
    family: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    force: bool = False


def run(options: ConvertOptions) -> None:
    """Write a file of adapters in this project's format.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
    """
    source, target = Path(options.source), Path(options.target)
    check_target(target, options.force)
    header = read_header(source)
    adapters = load_adapters(source, family=options.family)
    if FORMAT_KEY in header.entries and options.family not in (None, adapters.family):
        raise InputError(
            f"{source} is in our format and says that its family is {adapters.family}; --family {options.family} is for "
            "released files, which carry none."
        )
    dtype = DTYPES[options.dtype or _common_dtype(header.dtypes)]
    _refuse_overflow(adapters, dtype)
    save_adapters(adapters, target, dtype=dtype)
    print(printable(str(target)))


def check_target(target: Path, force: bool) -> None:
    """Refuse a file that adapters cannot be written to.

    Args:
        target: The file.
        force: Whether it may be replaced.

    Raises:
        InputError: It has another ending, exists, or its folder does not.
    """
    if target.suffix != ".safetensors":
        raise InputError(f"The target must end in .safetensors; given {target}.")
    if target.exists() and not force:
        raise InputError(f"{target} exists. Give another name, or --force to replace it.")
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {target.parent}. Create it, or give another one.")


def _common_dtype(dtypes: set[str]) -> str:
    return min(dtypes) if len(dtypes) == 1 and dtypes <= set(DTYPES) else "float32"


def _refuse_overflow(adapters: AdapterSet, dtype: torch.dtype) -> None:
    if not all(bool(p.to(dtype).isfinite().all()) for p in adapters.parameters()):
        raise InputError(f"A weight is too large for {dtype}. Use --dtype bfloat16 or float32.")
