"""``dreamcache inspect``: adapters, a saved reference, or something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..config import Config
from ..files.tensor_file import FORMAT_KEY, kind_of_weights, read_header
from ..files.texts import parse_json
from ..method import adapter_files as checkpoints
from ..method import cache
from ..method.adapter import AdapterSet
from ..method.adapter_files import load_adapters
from ..method.cache import ReferenceCache
from ..names import printable


@dataclass(frozen=True)
class InspectOptions(Config):
    """Say what an adapter or reference file is.

    Attributes:
        file: Any file of weights.
    """

    file: str


def run(options: InspectOptions) -> None:
    """Print what a file is."""
    for name, value in describe_file(Path(options.file)):
        print(printable(f"{name + ':':<12} {value}".rstrip()))


def describe_file(path: Path) -> list[tuple[str, str]]:
    """Describe a file of weights, line by line.

    Args:
        path: The file.

    Returns:
        Headings and texts, in the order to show them.

    Raises:
        FileFormatError: The file is missing, damaged, or no file of weights at all.
    """
    header = read_header(path)
    kind, found = kind_of_weights(header.tensors), header.entries.get(FORMAT_KEY)
    if found == cache.FORMAT:
        return [("file", str(path)), *_describe_reference(ReferenceCache.load(path)).items()]
    is_released = found is None and kind.startswith("DreamCache adapters")
    if found == checkpoints.FORMAT or is_released:
        adapters = load_adapters(path)
        text = _describe_adapters(adapters, is_released)
        dtypes = ", ".join(sorted(header.dtypes))
        said = _describe_extra(adapters.info.extra)
        return [("file", str(path)), *text.items(), ("dtype", dtypes), *said]
    what = kind if found is None else f"a DreamCache file of unknown format {found}"
    return [
        ("file", str(path)),
        ("kind", f"{what}: neither DreamCache adapters nor a saved reference"),
        ("tensors", str(len(header.tensors))),
    ]


def _describe_adapters(adapters: AdapterSet, is_released: bool) -> dict[str, str]:
    info = adapters.info
    family = f"{info.layout.family} (text width {info.layout.context_width})"
    if is_released:
        family += ", assumed: a released file carries none"
    return {
        "kind": "DreamCache adapters, " + ("as released" if is_released else "own format"),
        "family": family,
        "layers": ", ".join(f"{name} ({width})" for name, width in info.layout.channels.items()),
        "parameters": f"{adapters.num_parameters:,}",
        "timestep": str(info.timestep),
        "prediction": info.prediction,
        "base model": info.base_model or "not stated",
    }


def _describe_extra(extra: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What a file says of itself, under one heading; settings, which are JSON objects, one by one without those not set."""
    if extra:
        yield "the file says", ""
    for name, text in extra.items():
        try:
            values = parse_json(text)
        except ValueError:
            values = None
        if isinstance(values, dict):
            yield f"  {name}", ""
            settings = cast(dict[str, Any], values).items()
            yield from (
                (f"    {key}", str(value)) for key, value in settings if value not in (None, [])
            )
        else:
            yield f"  {name}", text


def _describe_reference(reference: ReferenceCache) -> dict[str, str]:
    height, width = reference.latent_size
    features = reference.features.items()
    return {
        "kind": "saved DreamCache reference",
        "family": f"{reference.family} (text width {reference.context_width})",
        "layers": ", ".join(f"{name} {tuple(f.shape[1:])}" for name, f in features),
        "images": str(reference.num_references),
        "latent": f"{height} x {width} (height x width)",
        "timestep": str(reference.timestep),
        "seed": "not stated" if reference.seed is None else str(reference.seed),
        "mask": "none" if reference.masks is None else "subject marked",
        "dtype": str(next(iter(reference.features.values())).dtype).removeprefix("torch."),
        "size": f"{reference.nbytes / 2**20:.1f} MiB",
    }
