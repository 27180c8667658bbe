"""Adapter files in and out: our safetensors format and the released one. The only place that knows the released keys."""

import json
import logging
import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import FileFormatError, InputError
from ..files.tensor_file import (
    FORMAT_KEY,
    is_finite,
    kind_of_weights,
    read_header,
    read_tensor_file,
    read_weights,
    shorten,
    write_tensor_file,
)
from ..names import printable
from .adapter import AdapterInfo, AdapterSet
from .layers import FAMILY_OF_CONTEXT_WIDTH, LAYER_NAME, Layout, check_layer_names

logger = logging.getLogger(__name__)

FORMAT = "adapters/1"

WHERE_FROM = (
    "Adapters for Stable Diffusion 2.1-base are the file cross_attention-<step>.pt that the DreamCache authors "
    "released; others are trained with this pack."
)

_RELEASED_NAMES = {
    "attn_mem.to_q.weight": "to_q.weight",
    "attn_mem.to_k.weight": "to_k.weight",
    "attn_mem.to_v.weight": "to_v.weight",
    "attn_mem.to_out.0.weight": "to_out.weight",
    "attn_mem.to_out.0.bias": "to_out.bias",
    "norm2_mem.weight": "norm.weight",
    "norm2_mem.bias": "norm.bias",
    "linear_cat.weight": "merge.weight",
    "linear_cat.bias": "merge.bias",
}
_RELEASED_KEY = re.compile(
    rf"(?P<prefix>(?:model\.)?diffusion_model\.|)(?P<layer>{LAYER_NAME})\.transformer_blocks\.0\.(?P<name>.+)"
)


def save_adapters(
    adapters: AdapterSet, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """Write adapters in our format, all or nothing.

    Args:
        adapters: The adapters.
        path: Target; its folder must exist.
        dtype: Float type on disk; ``None`` keeps that of each tensor.

    Raises:
        InputError: The folder does not exist or cannot be written to, or the adapters are fused.
    """
    if not isinstance(adapters, AdapterSet):
        raise InputError(
            f"Expected an AdapterSet, given {type(adapters).__name__}. Save the set that it was fused from."
        )
    info = adapters.info
    tensors = {
        f"{layer}.{name}": tensor.to(dtype or tensor.dtype)
        for layer in adapters.layers
        for name, tensor in adapters[layer].state_dict().items()
    }
    metadata = {
        **info.extra,
        "format": FORMAT,
        "family": info.layout.family,
        "context_width": str(info.layout.context_width),
        "layers": json.dumps(info.layout.layers),
        "timestep": str(info.timestep),
        "base_model": info.base_model,
        "prediction": info.prediction,
    }
    write_tensor_file(path, tensors, metadata)


def load_adapters(path: str | os.PathLike[str], *, family: str | None = None) -> AdapterSet:
    """Read adapters in our format or as the authors released them.

    Args:
        path: A ``.safetensors`` or ``.pt`` file. Pickles are read weights-only.
        family: Family of a released file, which does not carry one: ``sd15``, ``sd21``, ``sdxl`` or
            ``custom-<width>``; ``None`` counts as ``sd21``. Ignored for files in our format.

    Returns:
        The adapters in float32 on the CPU, every tensor and shape checked.

    Raises:
        FileFormatError: The file is damaged, something else, or has missing, unknown, misshapen or non-finite
            tensors; the message says which and what to do.
        InputError: ``family`` is unknown.
    """
    header, source = read_header(path), os.fspath(path)
    # each twice: first on the header alone, so that other files are refused before they are read
    if FORMAT_KEY in header.entries:
        if header.entries[FORMAT_KEY] == FORMAT:
            _from_own(source, header.tensors, header.metadata)
        return _from_own(source, *read_tensor_file(path, FORMAT))
    described = adapters_from_released(header.tensors, family=family, source=source)
    tensors = read_weights(path, header)
    return adapters_from_released(tensors, family=described.family, source=source)


def adapters_from_released(
    tensors: Mapping[str, Tensor], *, family: str | None = None, source: str = "The state dict"
) -> AdapterSet:
    """Build adapters from a state dict with the released key names.

    Source: METHOD.md section 6.

    Args:
        tensors: Tensors by released key, any of the three prefixes, any float type.
        family: See ``load_adapters``.
        source: What to call it in messages.

    Returns:
        The adapters in float32.

    Raises:
        FileFormatError: See ``load_adapters``.
    """
    own: dict[str, Tensor] = {}
    unknown: list[str] = []
    prefixes: set[str] = set()
    layers: set[str] = set()
    for key, tensor in tensors.items():
        match = _RELEASED_KEY.fullmatch(key)
        if match and match["name"] in _RELEASED_NAMES:
            own[f"{match['layer']}.{_RELEASED_NAMES[match['name']]}"] = tensor
            prefixes.add(match["prefix"])
            layers.add(match["layer"])
        else:
            unknown.append(key)
    if not own:
        kind = kind_of_weights(set(tensors))
        if kind.startswith("DreamCache"):
            kind = f"under an unknown prefix ({shorten(sorted(tensors), 1)})"
        raise FileFormatError(f"{source} is {kind}, not DreamCache adapters. {WHERE_FROM}")
    if len(prefixes) > 1:
        raise FileFormatError(
            f"{source} mixes keys of several prefixes ({', '.join(repr(p) for p in sorted(prefixes))}): two sets of "
            "adapters in one file. Save one of them on its own."
        )
    if family is None:
        logger.info(
            "%s carries no model family: it counts as sd21 (Stable Diffusion 2.1-base). If it is for another: dreamcache "
            "convert --family sd15, say.",
            source,
        )
    context_width = _context_width("sd21" if family is None else family)
    layout = _layout(own, sorted(layers, key=_execution_order), context_width)
    return _assemble(source, AdapterInfo(layout), own, unknown)


def _from_own(source: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> AdapterSet:
    entries = dict(metadata)
    try:
        layers = check_layer_names(json.loads(entries.pop("layers")))
        layout = _layout(tensors, layers, int(entries.pop("context_width")))
        for key in ("format", "family", "sha256"):  # known already
            entries.pop(key, None)
        info = AdapterInfo(
            layout,
            timestep=int(entries.pop("timestep", "1")),
            base_model=printable(entries.pop("base_model", "")),
            prediction=printable(entries.pop("prediction", "epsilon")),
            extra=entries,
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{source} lacks a valid metadata entry ({error}). Convert or save the adapters again."
        ) from error
    return _assemble(source, info, tensors, [])


def _layout(tensors: Mapping[str, Tensor], layers: list[str], context_width: int) -> Layout:
    """Read the layers' widths off the tensors."""
    channels: dict[str, int] = {}
    for layer in layers:
        # every tensor's first axis is the layer's width: what most of them say counts
        widths = [
            t.shape[0]
            for k, t in tensors.items()
            if k.startswith(f"{layer}.") and t.ndim and t.numel()
        ]
        channels[layer] = max(sorted(widths), key=widths.count, default=1) or 1
    return Layout(context_width, channels)


def _assemble(
    source: str, info: AdapterInfo, tensors: Mapping[str, Tensor], unknown: list[str]
) -> AdapterSet:
    """Check tensors by our own keys, and make adapters of them."""
    with torch.device("meta"):
        adapters = AdapterSet(info)
    expected = {
        f"{layer}.{name}": tensor
        for layer in adapters
        for name, tensor in adapters[layer].state_dict().items()
    }
    _check_tensors(source, expected, tensors, unknown)
    for layer in adapters:
        state = {name: tensors[f"{layer}.{name}"].float() for name in adapters[layer].state_dict()}
        adapters[layer].load_state_dict(state, assign=True)
    return adapters


def _check_tensors(
    source: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], unknown: list[str]
) -> None:
    unknown = [*unknown, *(set(tensors) - set(expected))]
    present = [key for key in expected if key in tensors]
    misshapen = [
        f"{key} {tuple(tensors[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in present
        if tensors[key].shape != expected[key].shape
    ]
    not_float = [key for key in present if not tensors[key].is_floating_point()]
    problems = {
        "missing": sorted(set(expected) - set(tensors)),
        "unknown": sorted(unknown),
        "misshapen": sorted(misshapen),
        "not of a float type": sorted(not_float),
        "with NaN or infinite values": sorted(
            key for key in present if key not in not_float and not is_finite(tensors[key])
        ),
    }
    listed = [f"{len(keys)} {what}: {shorten(keys)}" for what, keys in problems.items() if keys]
    if listed:
        raise FileFormatError(
            f"{source} does not hold complete DreamCache adapters. Tensors {'; '.join(listed)}. Download or convert "
            "the file again."
        )


def _context_width(family: str) -> int:
    for width, name in FAMILY_OF_CONTEXT_WIDTH.items():
        if name == family:
            return width
    if match := re.fullmatch(r"custom-([1-9]\d*)", family):
        return int(match[1])
    raise InputError(
        f"Unknown family {family!r}. Give sd15, sd21, sdxl or custom-<context width>, custom-512 say."
    )


def _execution_order(layer: str) -> tuple[str, list[int]]:
    part, *numbers = layer.split(".")  # input, middle, output: also in order of the alphabet
    return part, [int(number) for number in numbers]
