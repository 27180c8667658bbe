"""What ComfyUI calls around a sampling run, its steps and the U-Net, once references are applied."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...dreamcache_core import Guidance, InputError
from ...dreamcache_core.images.reference import check_mask_aspect
from ...dreamcache_core.method.compiling import uncompiled
from ...dreamcache_core.method.guidance import fold_guidance
from .applied import KEY, REGION, Applied, AppliedUse, RunStore, compute_dtype
from .gates import GATE, mark, off_copy, sees_reference, without_gates
from .patches import add_patches, prepare_references

logger = logging.getLogger(__name__)

ACTIVE = "dreamcache_active"
RELABEL = "dreamcache_relabel"
RUN = "dreamcache_run"
GUIDANCE = "dreamcache_guidance"
UNCONDITIONAL = "dreamcache_unconditional"

WRAPPER_TYPES = (
    WrappersMP.OUTER_SAMPLE,
    WrappersMP.PREPARE_SAMPLING,
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
)


class Wrappers:
    """What ComfyUI calls around a sampling run, its steps and the U-Net, once references are applied.

    Holds immutable state only; ComfyUI shares it between clones and threads. Each method is named for the wrapper type
    that it is registered under and calls ``executor`` to go on.
    """

    def __init__(self, applied: Applied) -> None:
        self.applied = applied

    def __deepcopy__(self, memo: dict[int, Any]) -> "Wrappers":
        """Return the same object: it cannot change."""
        return self

    def install(self, model: ModelPatcher) -> None:
        """Register all methods on a clone."""
        for wrapper_type in WRAPPER_TYPES:
            model.add_wrapper_with_key(wrapper_type, KEY, getattr(self, wrapper_type))

    def outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep a store for this run, and empty it whatever happens."""
        guider = executor.class_obj
        _check_regions(self.applied.uses, noise)
        sampling = guider.model_patcher.get_model_object("model_sampling")
        store, original = RunStore(self.applied, sampling), guider.model_options
        guider.model_options = _with_transformer_options(original, {RUN: store})
        guider.model_options[GUIDANCE] = getattr(guider, GUIDANCE, self.applied.guidance)
        try:
            return executor(noise, *args, **kwargs)
        finally:
            guider.model_options = original
            store.clear()

    def prepare_sampling(
        self,
        executor: Any,
        model: ModelPatcher,
        shape: Sequence[int],
        conds: Any,
        model_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Let ComfyUI leave room for a third row per image and for the keys and values."""
        guidance = (model_options or {}).get(GUIDANCE, self.applied.guidance)
        reserved = _shape_to_reserve(self.applied.uses, guidance, model, shape)
        return executor(model, reserved, conds, model_options=model_options, **kwargs)

    def predict_noise(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Find out once per step which references act, and keep the negative alive at cfg 1 where it is needed."""
        guider = executor.class_obj
        store = self._store(model_options, guider.inner_model)
        store.begin_step()
        active = store.active_at(timestep)
        options = _with_transformer_options(model_options, {RUN: store, ACTIVE: active})
        needs_third = False
        if active:
            guidance = options.get(GUIDANCE, self.applied.guidance)
            options[GUIDANCE] = store.guidance_at(guidance, timestep)
            needs_third = options[GUIDANCE].needs_unconditional
        if needs_third:
            options[UNCONDITIONAL] = getattr(guider, "conds", {}).get(UNCONDITIONAL)
            options["disable_cfg1_optimization"] = True
        result = executor(x, timestep, options, *args, **kwargs)
        if needs_third and store.is_unfolded and guider.conds.get("negative") is not None:
            _warn_once_of_missing_term(store)
        return result

    def calc_cond_batch(
        self,
        executor: Any,
        model: Any,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Mark which rows see the references, add the prediction without them and fold three into two."""
        store = self._store(model_options, model)
        active = model_options.get("transformer_options", {}).get(ACTIVE)
        if active is None:
            active = store.active_at(timestep)
        if not active:
            return executor(
                model, without_gates(conds), x, timestep, model_options, *args, **kwargs
            )
        guidance = store.guidance_at(model_options.get(GUIDANCE, self.applied.guidance), timestep)
        options = _with_transformer_options(model_options, {RUN: store, ACTIVE: active})
        regions = store.region_conds(active, x)
        negative_is_off = len(conds) == 2 and guidance.mode == "joint"
        marked = [
            cond and [mark(c, not (negative_is_off and i == 1), regions) for c in cond]
            for i, cond in enumerate(conds)
        ]
        if len(conds) == 1 and marked[0] is not None and sees_reference(marked[0]):
            (nested,) = executor(model, marked, x, timestep, options, *args, **kwargs)
            return [store.shift_nested(nested)]
        if len(conds) != 2 or None in conds or not guidance.needs_unconditional:
            store.is_unfolded = True
            return executor(model, marked, x, timestep, options, *args, **kwargs)
        without = model_options.get(UNCONDITIONAL) or conds[1]
        # packs that index (cond, uncond)[i] must not meet our third list's index
        options["transformer_options"][RELABEL] = {2: 1}
        lists = [*marked, [off_copy(cond, regions) for cond in without]]
        text, reference, plain = executor(model, lists, x, timestep, options, *args, **kwargs)
        folded = fold_guidance(
            plain, reference, text, image_guidance_scale=guidance.image_guidance_scale
        )
        store.offsets.append(folded[1] - reference)
        return list(folded)

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Add the patches that attend to the references, for this one call of the U-Net."""
        options = dict(transformer_options or {})
        gate = kwargs.pop(GATE, None)
        regions = {i: kwargs.pop(f"{REGION}{i}", None) for i in range(len(self.applied.uses))}
        store = self._store({"transformer_options": options}, executor.class_obj)
        active = options.pop(ACTIVE, None)
        if active is None:
            active = store.active_at(t)
        options.pop(RUN, None)
        relabel = options.pop(RELABEL, {})
        if relabel and "cond_or_uncond" in options:
            options["cond_or_uncond"] = [relabel.get(i, i) for i in options["cond_or_uncond"]]
        is_on = (True,) * len(x) if gate is None else tuple(g != 0 for g in gate.flatten().tolist())
        if not (active and any(is_on)):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        references = prepare_references(
            active, self.applied, executor.class_obj, store, x.device, regions
        )
        add_patches(options, references, store.row_index(is_on, x.device))
        # TorchCompileModel drops the guards on transformer_options: a graph made without our patches, or with other
        # scales, would be taken for a call with them, and the reverse
        with uncompiled:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _store(self, model_options: dict[str, Any], base_model: Any) -> RunStore:
        """Return the store of the run, or one for this call where another node has left ``outer_sample`` out."""
        store = model_options.get("transformer_options", {}).get(RUN)
        return RunStore(self.applied, base_model.model_sampling) if store is None else store


def _check_regions(uses: Sequence[AppliedUse], noise: Tensor) -> None:
    """Refuse region masks that do not fit the images to be made, before anything is computed."""
    for applied_use in uses:
        region = applied_use.use.regions
        if region is None:
            continue
        check_mask_aspect(region, *noise.shape[-2:])
        if len(region) not in (1, len(noise)):
            raise InputError(
                f"Expected one region mask for Apply DreamCache, or one for each of the {len(noise)} images; given "
                f"{len(region)}."
            )


def _warn_once_of_missing_term(store: RunStore) -> None:
    if not store.has_warned:
        store.has_warned = True
        logger.warning(
            "image_guidance has no effect in this graph: the guider, or another node, asks for its predictions one by one or "
            "for more than two. Set image_guidance to 1, or mark the texts with DreamCache Conditioning."
        )


def _with_transformer_options(options: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = create_model_options_clone(options)
    merged["transformer_options"] = {**merged.get("transformer_options", {}), **extra}
    return merged


def _shape_to_reserve(
    uses: Sequence[AppliedUse], guidance: Guidance, model: ModelPatcher, shape: Sequence[int]
) -> list[int]:
    """Widen the latent that ComfyUI estimates memory for, by a third row per image and the keys and values.

    ComfyUI counts two rows per image, so half of an image more makes the third row.
    """
    if not uses:
        return list(shape)
    element = compute_dtype(model.model).itemsize
    kv_bytes = sum(
        2 * feature.numel() * element
        for applied_use in uses
        for feature in applied_use.use.reference.features.values()
    )
    two_rows = model.model.memory_required([2 * shape[0], *shape[1:]])
    share = (1.5 if guidance.needs_unconditional else 1.0) + kv_bytes / max(two_rows, 1.0)
    return [*shape[:-1], math.ceil(shape[-1] * share)]
