"""What we ask of a MODEL, and the adapters as a model of their own under ComfyUI's memory management."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_patcher
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...dreamcache_core import AdapterSet, FusedAdapterSet, InputError, Layout
from ...dreamcache_core.method.adapter import FusedAdapter
from ...dreamcache_core.method.backends import layout_of, require_fit
from ...dreamcache_core.method.compiling import plain_module

SIDE_PX, SDXL_SIDE_PX = 512, 1024

_fused: "WeakKeyDictionary[AdapterSet, dict[tuple[Any, ...], ModelPatcher]]" = WeakKeyDictionary()


def unet_of(model: ModelPatcher) -> Any:
    """The U-Net inside a MODEL, not compiled."""
    return plain_module(model.model.diffusion_model)


def model_layout(model: ModelPatcher, layers: Sequence[str] | None = None) -> Layout:
    """Layout of a MODEL, see ``layout_of``."""
    return layout_of(unet_of(model), layers, _context_width(model))


def require_model_fit(model: ModelPatcher, layout: Layout) -> None:
    """Refuse a MODEL that adapters were not made for, see ``require_fit``."""
    require_fit(unet_of(model), layout, "the adapters are for", _context_width(model))


def _context_width(model: ModelPatcher) -> int | None:
    # other nodes replace the modules that it could be read off, and other packs' models have no settings
    config = getattr(model.model, "model_config", None)
    return config and config.unet_config.get("context_dim")


def default_side_px(model: ModelPatcher) -> int:
    """Side of the images that a MODEL of this family was trained on, pixels."""
    family = SDXL_SIDE_PX if model_layout(model).family == "sdxl" else SIDE_PX
    return getattr(model.model, "side_px", family)


def compute_dtype(model: ModelPatcher) -> torch.dtype:
    """Float type that a MODEL computes in, also when it is not loaded yet; it is not always that of its weights."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def check_channels(latent: Tensor, channels: int) -> None:
    """Refuse latents of another number of channels than a model takes."""
    if latent.shape[1] != channels:
        raise InputError(
            f"The model takes latents of {channels} channels, the VAE gave {latent.shape[1]}. Connect the VAE of this model."
        )


def adapter_patcher(adapters: AdapterSet, model: ModelPatcher) -> ModelPatcher:
    """Fuse adapters for generation and hand them to ComfyUI's memory management; once per set, float type and device.

    Args:
        adapters: The adapters.
        model: The MODEL that they will work in.

    Returns:
        A ModelPatcher around a ``FusedAdapterSet`` made of ``comfy.ops.manual_cast`` layers.
    """
    dtype = compute_dtype(model)
    devices = (model.load_device, model.offload_device)
    key, known = (dtype, devices), _fused.setdefault(adapters, {})
    if key not in known:
        known[key] = _adapter_patcher(adapters.fuse(comfy.ops.manual_cast, dtype), dtype, *devices)
    return known[key]


def _adapter_patcher(
    fused: FusedAdapterSet,
    dtype: torch.dtype,
    *devices: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    patcher = managed(fused, *devices, disable_dynamic=disable_dynamic)
    # lets ComfyUI make a copy: for each of several devices, or without dynamic VRAM
    patcher.cached_patcher_init = (_copy_patcher, (fused, dtype, *devices))
    return patcher


def _copy_patcher(
    fused: FusedAdapterSet,
    dtype: torch.dtype,
    *devices: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    copies = {
        layer: FusedAdapter(fused[layer].state_dict(), comfy.ops.manual_cast, dtype)
        for layer in fused.layers
    }
    copy = FusedAdapterSet(copies, fused.info)
    return _adapter_patcher(copy, dtype, *devices, disable_dynamic=disable_dynamic)


def managed(
    module: nn.Module,
    load_device: torch.device,
    offload_device: torch.device,
    *,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Put a module under ComfyUI's memory management, as its own loaders do.

    Args:
        module: The module, on ``offload_device``.
        load_device: Where it computes.
        offload_device: Where it waits.
        disable_dynamic: Load all of it before use, also where ComfyUI has dynamic VRAM.
    """
    # one model outside dynamic VRAM makes ComfyUI free memory for the whole run by estimate
    dynamic = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    kind = ModelPatcher if disable_dynamic else dynamic
    return kind(module, load_device=load_device, offload_device=offload_device)
