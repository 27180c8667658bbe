"""ModelPatcher on the one side, plain core objects on the other.

With ``wrappers``, ``patches`` and ``gates`` all that knows ComfyUI's patch API. State lives in immutable values and in one
store per sampling run; no module is touched and nothing is kept in ``model_options``.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.ops
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ...dreamcache_core import (
    AdapterSet,
    FusedAdapterSet,
    Guidance,
    Layout,
    ReferenceUse,
    StateError,
)
from ...dreamcache_core.method.backends import layout_of
from ...dreamcache_core.method.compiling import plain_module
from .applied import KEY, Applied, AppliedUse, compute_dtype
from .wrappers import UNCONDITIONAL, WRAPPER_TYPES, Wrappers

_fused: "WeakKeyDictionary[AdapterSet, dict[tuple[Any, ...], ModelPatcher]]" = WeakKeyDictionary()


def unet_of(model: ModelPatcher) -> Any:
    """The U-Net inside a MODEL, not compiled."""
    return plain_module(model.model.diffusion_model)


def model_layout(model: ModelPatcher, layers: Sequence[str] | None = None) -> Layout:
    """Layout of a MODEL, see ``layout_of``."""
    return layout_of(unet_of(model), layers)


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


def applied_to(model: ModelPatcher) -> Applied | None:
    """What the Apply nodes before have put on a MODEL, or ``None``."""
    return model.attachments.get(KEY)


def apply_reference(
    model: ModelPatcher,
    use: ReferenceUse,
    patcher: ModelPatcher,
    guidance: Guidance,
    start_percent: float,
    end_percent: float,
) -> ModelPatcher:
    """Put one more reference on a clone of a MODEL.

    Args:
        model: The MODEL; left as it is.
        use: The reference, with the fused adapters of ``patcher``.
        patcher: From ``adapter_patcher``.
        guidance: Holds for all references of the clone from now on, in the range that was chosen before.
        start_percent: Progress from which on the reference acts, 0 to 1.
        end_percent: Progress up to which it acts, 0 to 1.

    Returns:
        The clone.
    """
    before = applied_to(model)
    applied_use = AppliedUse(use, patcher, start_percent, end_percent)
    if before:
        guidance = replace(guidance, image_range=before.guidance.image_range)
    return _with_applied(model, Applied((*(before.uses if before else ()), applied_use), guidance))


def limit_guidance(model: ModelPatcher, start_percent: float, end_percent: float) -> ModelPatcher:
    """Let image guidance hold for a part of the run only, on a clone of a MODEL.

    Args:
        model: A MODEL with references; left as it is.
        start_percent: Progress from which on it holds, 0 to 1.
        end_percent: Progress up to which it holds.

    Returns:
        The clone.

    Raises:
        InputError: The range is no part of the run.
        StateError: There is no reference on the MODEL.
    """
    applied = require_applied(model, "DreamCache Guidance Range")
    guidance = replace(applied.guidance, image_range=(start_percent, end_percent))
    return _with_applied(model, replace(applied, guidance=guidance))


def require_applied(model: ModelPatcher, node: str) -> Applied:
    """What the Apply nodes before have put on a MODEL.

    Raises:
        StateError: Nothing; the message names the node that needs it.
    """
    applied = applied_to(model)
    if applied is None:
        raise StateError(
            f"{node} needs a model with a reference on it; this one has none. Connect the model output of Apply DreamCache."
        )
    return applied


def _with_applied(model: ModelPatcher, applied: Applied) -> ModelPatcher:
    clone = model.clone()
    remove_references(clone)
    clone.set_attachments(KEY, applied)
    clone.set_additional_models(KEY, applied.acting.patchers)
    Wrappers(applied.acting).install(clone)
    return clone


def remove_references(model: ModelPatcher) -> None:
    """Take everything of DreamCache off a clone, in place."""
    for wrapper_type in WRAPPER_TYPES:
        model.remove_wrappers_with_key(wrapper_type, KEY)
    model.remove_additional_models(KEY)
    model.attachments.pop(KEY, None)


class DreamCacheCFGGuider(comfy.samplers.CFGGuider):
    """CFG with METHOD.md's three-term rule and an image guidance of its own; the wrappers on the MODEL do the work."""

    def set_dreamcache(
        self, positive: Any, negative: Any, unconditional: Any, image_guidance_scale: float
    ) -> None:
        """Set the conditionings and the image guidance.

        Args:
            positive: Prompt, with the reference.
            negative: Negative text, with the reference.
            unconditional: Text of the prediction without reference, or ``None`` for the negative.
            image_guidance_scale: s_image of METHOD.md section 5.

        Raises:
            StateError: There is no reference on the MODEL.
        """
        conds = {"positive": positive, "negative": negative}
        if unconditional is not None:
            # the key is not one that ComfyUI knows, so the prompt type has to be said
            conds[UNCONDITIONAL] = [
                [text, {**options, "prompt_type": "negative"}] for text, options in unconditional
            ]
        self.inner_set_conds(conds)
        image_range = require_applied(self.model_patcher, "DreamCache Guider").guidance.image_range
        self.dreamcache_guidance = Guidance(image_guidance_scale, "separate", image_range)
