"""What ComfyUI calls around a sampling run, its steps and the U-Net, once references are on a MODEL."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...dreamcache_core import Guidance, InputError
from ...dreamcache_core.images.reference import has_aspect
from ...dreamcache_core.method.cache import LATENT_FACTOR
from .applied import KEY, Applied, AppliedUse, applied_to
from .gates import ADDED, GATE, ON, without_gates
from .guider import UNCONDITIONAL, DreamCacheCFGGuider
from .model import compute_dtype
from .predictions import Predictions
from .report import show, without_path
from .run import PART_UNKNOWN, REGION, RunStore
from .unet.compiled import call_compiled
from .unet.patches import add_patches, prepare_references

logger = logging.getLogger(__name__)

WRAPPER_TYPES = (
    WrappersMP.OUTER_SAMPLE,
    WrappersMP.PREPARE_SAMPLING,
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
)


def with_references(model: ModelPatcher, applied: Applied) -> ModelPatcher:
    """Put references on a clone of a MODEL, in place of those that are on it."""
    clone = model.clone()
    remove_references(clone)
    clone.set_attachments(KEY, applied)
    clone.set_additional_models(KEY, applied.acting.patchers)
    wrappers = Wrappers(applied)
    for wrapper_type in WRAPPER_TYPES:
        clone.add_wrapper_with_key(wrapper_type, KEY, getattr(wrappers, wrapper_type))
    return clone


def remove_references(model: ModelPatcher) -> None:
    """Take everything of DreamCache off a clone, in place."""
    for wrapper_type in WRAPPER_TYPES:
        model.remove_wrappers_with_key(wrapper_type, KEY)
    model.remove_additional_models(KEY)
    model.attachments.pop(KEY, None)


OWN_WAY = "the guider, or another node, asks for its predictions in a way of its own. "
NEGATIVE_BY_HAND = "The negative sees the reference too; switch it off there with DreamCache Conditioning, or use CFGGuider."


class Wrappers:
    """What ComfyUI calls around a sampling run, its steps and the U-Net.

    Holds immutable state only; ComfyUI shares it between clones and threads. Each method is named for the wrapper type
    that it is registered under and calls ``executor`` to go on.
    """

    def __init__(self, applied: Applied) -> None:
        self.attachment = applied
        self.applied = applied.acting

    def __deepcopy__(self, memo: dict[int, Any]) -> "Wrappers":
        """Return the same object: it cannot change."""
        return self

    def outer_sample(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep a store for this run, and empty it whatever happens."""
        guider = executor.class_obj
        for applied_use in self.applied.uses:
            _fit_region(applied_use, noise)
        own_guidance = guider.guidance if isinstance(guider, DreamCacheCFGGuider) else None
        sampling = guider.model_patcher.get_model_object("model_sampling")
        store = RunStore(self.applied, sampling, own_guidance)
        # the guider's options are ComfyUI's copy for this run
        options = guider.model_options["transformer_options"]
        options[KEY] = store
        try:
            result = executor(noise, *args, **kwargs)
        finally:
            options.pop(KEY, None)
            store.clear()
        if store.needs_unconditional and not store.has_unconditional:
            self._say_without_effect("image_guidance", _why_without_third(guider))
        if store.lacks_joint:
            self._say_without_effect("guidance joint", OWN_WAY + NEGATIVE_BY_HAND)
        return result

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
        store = (model_options or {}).get("transformer_options", {}).get(KEY)
        guidance = store.guidance if store else self.applied.guidance
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
        """Begin a step, and keep the negative alive at cfg 1 where it is needed."""
        guider = executor.class_obj
        with (
            self._store(model_options, guider.inner_model) as store,
            store.new_step(timestep, x) as step,
        ):
            step.positive = guider.conds.get("positive")
            if not step.needs_unconditional:
                return executor(x, timestep, model_options, *args, **kwargs)
            step.negative = guider.conds.get("negative")
            step.unconditional = guider.conds.get(UNCONDITIONAL)
            with _entry(model_options, "disable_cfg1_optimization", True):
                return executor(x, timestep, model_options, *args, **kwargs)

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

        def predict(lists: list[Any]) -> list[Tensor]:
            return executor(model, lists, x, timestep, model_options, *args, **kwargs)

        with self._store(model_options, model) as store, store.step_at(timestep, x) as step:
            if not step.active:
                return predict(without_gates(conds))
            if self._is_on(model):
                store.take_note(step, conds)
            return Predictions(predict, store, step, x, model_options).of(conds)

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
        base_model = executor.class_obj
        given = {"transformer_options": transformer_options or {}}
        options = {key: value for key, value in given["transformer_options"].items() if key != KEY}
        regions = {i: kwargs.pop(f"{REGION}{i}", None) for i in range(len(self.applied.uses))}
        gate = kwargs.pop(GATE, None)
        gates = [ON] * len(x) if gate is None else gate.flatten().tolist()
        if ADDED in gates and "cond_or_uncond" in options:
            # packs that index (cond, uncond)[i] must not meet our third list's index
            options["cond_or_uncond"] = [min(i, 1) for i in options["cond_or_uncond"]]
        is_on = tuple(value == ON for value in gates)
        with self._store(given, base_model) as store, store.step_at(t, x) as step:
            # DualModelGuider asks another network for its negative
            if not (step.active and any(is_on) and self._is_on(base_model)):
                return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
            if any(r is not None and r.shape[2:] != x.shape[2:] for r in regions.values()):
                store.warn_once(PART_UNKNOWN)
            references = prepare_references(step.active, store, base_model, x.device, regions)
            add_patches(options, references, store.row_index(is_on, x.device))
            executor.wrappers.append(call_compiled)
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    @contextmanager
    def _store(self, model_options: dict[str, Any], base_model: Any) -> Iterator[RunStore]:
        """Give the store of the run; where another node has left ``outer_sample`` out, a new one."""
        options = model_options.setdefault("transformer_options", {})
        if KEY in options:
            yield options[KEY]
            return
        store = RunStore(self.applied, base_model.model_sampling)
        with _entry(options, KEY, store):
            yield store

    def _is_on(self, base_model: Any) -> bool:
        return applied_to(base_model.current_patcher) is self.attachment

    def _say_without_effect(self, setting: str, why: str) -> None:
        """Tell the user that no step of a run could use a setting of Apply DreamCache."""
        message = f"{setting} has no effect in this graph: {why}"
        logger.warning(message)
        show(message, self.applied.node_id)


def _why_without_third(guider: Any) -> str:
    """Say why no step of a run could use the prediction without references."""
    if guider.conds.get("negative") is None:
        return (
            "this guider takes no negative text, and image_guidance needs one. Use CFGGuider or DreamCache Guider, or set "
            "image_guidance to 1."
        )
    return OWN_WAY + (
        "Set image_guidance to 1; to guide by the reference all the same, mark the texts with DreamCache Conditioning."
    )


@contextmanager
def _entry(options: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """Put an entry into a dictionary that other nodes keep their state in, and take it out again."""
    before = {key: options[key]} if key in options else {}
    options[key] = value
    try:
        yield
    finally:
        del options[key]
        options.update(before)


def _fit_region(applied_use: AppliedUse, noise: Tensor) -> None:
    """Say of a region mask that the images have another shape; refuse one for another number of images."""
    region, (height, width) = applied_use.use.regions, noise.shape[-2:]
    if region is None:
        return
    if len(region) not in (1, len(noise)):
        raise without_path(
            InputError(
                f"Apply DreamCache got {len(region)} region masks, but {len(noise)} images are sampled. Give one mask for all, "
                "or one for each."
            )
        )
    if not has_aspect(region, height, width):
        message = (
            f"The region mask of Apply DreamCache, {region.shape[-1]} x {region.shape[-2]}, was stretched to the images' shape, "
            f"{LATENT_FACTOR * width} x {LATENT_FACTOR * height}. Make it in that shape, or leave it out where a node samples tiles."
        )
        logger.warning(message)
        show(message, applied_use.node_id)


def _shape_to_reserve(
    uses: Sequence[AppliedUse], guidance: Guidance, model: ModelPatcher, shape: Sequence[int]
) -> list[int]:
    """Widen the latent that ComfyUI estimates memory for, by a third row per image and the keys and values.

    ComfyUI counts two rows per image, so half of an image more makes the third row.
    """
    if not uses:
        return list(shape)
    element = compute_dtype(model).itemsize
    kv_bytes = sum(
        2 * feature.numel() * element
        for applied_use in uses
        for feature in applied_use.use.reference.features.values()
    )
    two_rows = model.model.memory_required([2 * shape[0], *shape[1:]])
    share = (1.5 if guidance.needs_unconditional else 1.0) + kv_bytes / max(two_rows, 1.0)
    return [*shape[:-1], math.ceil(shape[-1] * share)]
