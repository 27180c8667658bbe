"""What we ask of a MODEL, and the adapters as a model of their own under ComfyUI's memory management."""

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...dreamcache_core import AdapterSet, FusedAdapterSet, InputError, Layout
from ...dreamcache_core.method.backends import layout_of
from ...dreamcache_core.method.compiling import plain_module

_fused: "WeakKeyDictionary[AdapterSet, dict[tuple[Any, ...], ModelPatcher]]" = WeakKeyDictionary()


def unet_of(model: ModelPatcher) -> Any:
    """The U-Net inside a MODEL, not compiled."""
    return plain_module(model.model.diffusion_model)


def model_layout(model: ModelPatcher, layers: Sequence[str] | None = None) -> Layout:
    """Layout of a MODEL, see ``layout_of``."""
    return layout_of(unet_of(model), layers)


def compute_dtype(base_model: Any) -> torch.dtype:
    """Float type that a BaseModel computes in, which is not always that of its weights."""
    return getattr(base_model, "manual_cast_dtype", None) or base_model.get_dtype()


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
    dtype = compute_dtype(model.model)
    devices = (model.load_device, model.offload_device)
    key, known = (dtype, devices), _fused.setdefault(adapters, {})
    if key not in known:
        known[key] = _new_patcher(adapters.fuse(comfy.ops.manual_cast, dtype), *devices)
    return known[key]


def _new_patcher(
    fused: FusedAdapterSet, load_device: torch.device, offload_device: torch.device
) -> ModelPatcher:
    patcher = ModelPatcher(fused, load_device=load_device, offload_device=offload_device)
    # lets a ComfyUI that samples on several devices make a copy for each of them
    patcher.cached_patcher_init = (_copy_patcher, (fused, load_device, offload_device))
    return patcher


def _copy_patcher(fused: FusedAdapterSet, *devices: torch.device) -> ModelPatcher:
    return _new_patcher(copy.deepcopy(fused), *devices)
