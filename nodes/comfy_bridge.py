"""ModelPatcher, wrappers and sigmas on the one side, plain core objects on the other.

The one file that knows ComfyUI's patch API. State lives in immutable values and in one store per
sampling run; no module is touched and nothing is kept in ``model_options``.
"""

import copy
import logging
import math
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.ops
import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.conds import CONDNoiseShape, CONDRegular
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..dreamcache_core import (
    AdapterSet,
    FusedAdapterSet,
    Guidance,
    InputError,
    Layout,
    ReferenceUse,
)
from ..dreamcache_core.backends import layout_of
from ..dreamcache_core.guidance import fold_guidance
from ..dreamcache_core.injection import LayerReference, blend_references, prepare_layer
from ..dreamcache_core.reference_image import check_mask_aspect

logger = logging.getLogger(__name__)

KEY = "dreamcache"
GATE = "dreamcache_gate"
ACTIVE = "dreamcache_active"
RELABEL = "dreamcache_relabel"
RUN = "dreamcache_run"
REGION = "dreamcache_region_"
GUIDANCE = "dreamcache_guidance"
UNCONDITIONAL = "dreamcache_unconditional"

_WRAPPERS = (
    WrappersMP.OUTER_SAMPLE,
    WrappersMP.PREPARE_SAMPLING,
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
)
_fused: "WeakKeyDictionary[AdapterSet, dict[tuple[Any, ...], ModelPatcher]]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class AppliedUse:
    """One Apply node's reference.

    Attributes:
        use: The reference with its adapters, scale and region.
        patcher: ModelPatcher of the adapters, as the Apply node made it.
        start_percent: Progress from which on it acts, 0 to 1, inclusive.
        end_percent: Progress up to which it acts, 0 to 1, exclusive.
    """

    use: ReferenceUse
    patcher: ModelPatcher
    start_percent: float
    end_percent: float

    @property
    def is_always_on(self) -> bool:
        """Whether the range covers every step, so that no sigma has to be read."""
        return self.start_percent <= 0 and self.end_percent >= 1


@dataclass(frozen=True, eq=False)
class Applied:
    """Everything that the Apply nodes up to here have put on a MODEL; immutable, shared by clones."""

    uses: tuple[AppliedUse, ...]
    guidance: Guidance

    @property
    def patchers(self) -> list[ModelPatcher]:
        """The adapters' ModelPatchers, each once."""
        return list(dict.fromkeys(applied.patcher for applied in self.uses))

    def sigma_ranges(self, sampling: Any) -> tuple[tuple[float, float], ...]:
        """Noise levels from which on (inclusive) and down to which (exclusive) each use acts, for a ``model_sampling``."""
        return tuple(
            (
                _float32(sampling.percent_to_sigma(use.start_percent)),
                _float32(sampling.percent_to_sigma(use.end_percent)),
            )
            for use in self.uses
        )


class RunStore:
    """What one sampling run computes once and needs at every step; dropped when the run ends.

    Args:
        applied: The references of the run.
        sampling: The ``model_sampling`` of the MODEL that samples.
    """

    def __init__(self, applied: Applied, sampling: Any) -> None:
        self.uses = applied.uses
        self.is_ranged = not all(use.is_always_on for use in applied.uses)
        self.ranges = applied.sigma_ranges(sampling) if self.is_ranged else ()
        self.prepared: dict[tuple[Any, ...], LayerReference] = {}
        self.rows: dict[tuple[Any, ...], Tensor] = {}
        self.regions: dict[tuple[Any, ...], Tensor] = {}
        self.offsets: list[Tensor] = []
        self.num_nested = 0
        self.is_unfolded = False
        self.has_warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunStore":
        """Return the same store: ComfyUI copies options at every step."""
        return self

    def active_at(self, timestep: Tensor) -> tuple[int, ...]:
        """Indices of the uses whose range holds a noise level; it is read back only where a range needs it.

        Args:
            timestep: Sigma of each row, (rows,), all equal.
        """
        if not self.is_ranged:
            return tuple(range(len(self.uses)))
        sigma = float(timestep.flatten()[0])
        return tuple(i for i, (start, end) in enumerate(self.ranges) if end < sigma <= start)

    def row_index(self, is_on: tuple[bool, ...], device: torch.device) -> Tensor | None:
        """Indices of the rows that are on, int64; ``None`` where all are."""
        if all(is_on):
            return None
        if (is_on, device) not in self.rows:
            self.rows[is_on, device] = torch.tensor(is_on).nonzero().flatten().to(device)
        return self.rows[is_on, device]

    def region_conds(self, active: Sequence[int], x: Tensor) -> dict[str, CONDNoiseShape]:
        """Region masks of the active uses at the size of a latent, as ComfyUI crops and batches latents themselves.

        Args:
            active: Indices of the uses.
            x: The latents, (images, channels, height, width).
        """
        conds: dict[str, CONDNoiseShape] = {}
        for index in active:
            region = self.uses[index].use.regions
            if region is None:
                continue
            key = (index, x.shape[0], x.shape[2:], x.device)
            if key not in self.regions:
                resized = F.interpolate(region[:, None].to(x.device), size=x.shape[2:], mode="area")
                self.regions[key] = resized.expand(x.shape[0], -1, -1, -1)
            conds[f"{REGION}{index}"] = CONDNoiseShape(self.regions[key])
        return conds

    def begin_step(self) -> None:
        """Forget what belongs to the step before."""
        self.offsets.clear()
        self.num_nested = 0
        self.is_unfolded = False

    def shift_nested(self, prediction: Tensor) -> Tensor:
        """Bring a further prediction of this step to where ``fold_guidance`` has put the step's own.

        Other nodes (PAG, SAG) take the difference of the two, which must not see the fold.

        Args:
            prediction: With the reference, of the size of the step's own.
        """
        if not self.offsets:
            return prediction
        offset = self.offsets[self.num_nested % len(self.offsets)]
        self.num_nested += 1
        return prediction + offset if offset.shape == prediction.shape else prediction

    def clear(self) -> None:
        """Forget everything."""
        self.begin_step()
        for kept in (self.prepared, self.rows, self.regions):
            kept.clear()


class _Uncompiled:
    """Sets ``torch.compile`` aside while any thread is inside.

    ComfyUI's TorchCompileModel drops the guards on ``transformer_options``, so that a graph made without our patches
    (or with other scales) would be taken for a call with them, and the reverse.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            # torch before 2.6 has no stances, and no dropped guards either
            if self._depth == 0 and hasattr(torch.compiler, "set_stance"):
                self._stance = torch.compiler.set_stance("force_eager")
            self._depth += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._stance is not None:
                self._stance.__exit__(*error)


_uncompiled = _Uncompiled()


def unet_of(model: ModelPatcher) -> Any:
    """The U-Net inside a MODEL, not compiled."""
    unet = model.model.diffusion_model
    return getattr(unet, "_orig_mod", unet)


def model_layout(model: ModelPatcher, layers: Sequence[str] | None = None) -> Layout:
    """Layout of a MODEL, see ``layout_of``."""
    return layout_of(unet_of(model), layers)


def compute_dtype(model: Any) -> torch.dtype:
    """Float type that a BaseModel computes in, which is not always that of its weights."""
    return getattr(model, "manual_cast_dtype", None) or model.get_dtype()


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
        guidance: Holds for all references of the clone from now on.
        start_percent: Progress from which on the reference acts, 0 to 1.
        end_percent: Progress up to which it acts, 0 to 1.

    Returns:
        The clone.
    """
    before = applied_to(model)
    applied_use = AppliedUse(use, patcher, start_percent, end_percent)
    applied = Applied((*(before.uses if before else ()), applied_use), guidance)
    clone = model.clone()
    remove_references(clone)
    clone.set_attachments(KEY, applied)
    acting = replace(applied, uses=tuple(u for u in applied.uses if u.use.is_active))
    clone.set_additional_models(KEY, acting.patchers)
    _Wrappers(acting).install(clone)
    return clone


def remove_references(model: ModelPatcher) -> None:
    """Take everything of DreamCache off a clone, in place."""
    for wrapper_type in _WRAPPERS:
        model.remove_wrappers_with_key(wrapper_type, KEY)
    model.remove_additional_models(KEY)
    model.attachments.pop(KEY, None)


def _float32(value: float) -> float:
    # sigmas arrive as float32: a bound that was rounded elsewhere would be off by one step
    return float(torch.tensor(value, dtype=torch.float32))


def gate_conditioning(conditioning: list[Any], use_reference: bool) -> list[Any]:
    """Mark a CONDITIONING as seeing the references or not.

    Args:
        conditioning: ComfyUI's CONDITIONING; left as it is.
        use_reference: Whether its rows see the references.

    Returns:
        A new CONDITIONING.
    """
    # a text without a mark sees the references
    return [
        [text, _without_gate(options) if use_reference else _mark(options, False, {}, force=True)]
        for text, options in conditioning
    ]


def _mark(
    cond: dict[str, Any], is_on: bool, regions: dict[str, CONDNoiseShape], *, force: bool = False
) -> dict[str, Any]:
    """Add to a conditioning whether its rows see the references, unless it says so itself, and where."""
    model_conds = {**cond.get("model_conds", {}), **regions}
    if force or GATE not in model_conds:
        # integers are left alone by ComfyUI's casts; a tensor travels with its row through every re-batching
        model_conds[GATE] = CONDRegular(torch.tensor([[int(is_on)]], dtype=torch.long))
    return {**cond, "model_conds": model_conds}


def _sees_reference(marked: list[dict[str, Any]]) -> bool:
    return all(bool(cond["model_conds"][GATE].cond.any()) for cond in marked)


def _without_gate(cond: dict[str, Any]) -> dict[str, Any]:
    model_conds = cond.get("model_conds", {})
    if GATE not in model_conds:
        return cond
    return {**cond, "model_conds": {k: v for k, v in model_conds.items() if k != GATE}}


def _without_gates(conds: list[Any]) -> list[Any]:
    return [None if cond is None else [_without_gate(item) for item in cond] for cond in conds]


def _off_copy(cond: dict[str, Any], regions: dict[str, CONDNoiseShape]) -> dict[str, Any]:
    """Return a copy of a conditioning that sees no reference, with an identity of its own that does not change."""
    off = _mark(cond, False, regions, force=True)
    if isinstance(cond.get("uuid"), uuid.UUID):
        off["uuid"] = uuid.uuid5(cond["uuid"], "dreamcache-off")
    return off


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


class _Wrappers:
    """What ComfyUI calls around a sampling run, its steps and the U-Net, once references are applied.

    Holds immutable state only; ComfyUI shares it between clones and threads. Each method is named for the wrapper type
    that it is registered under and calls ``executor`` to go on.
    """

    def __init__(self, applied: Applied) -> None:
        self.applied = applied

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Wrappers":
        """Return the same object: it cannot change."""
        return self

    def install(self, model: ModelPatcher) -> None:
        """Register all methods on a clone."""
        for wrapper_type in _WRAPPERS:
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
        seed: Any = None,
    ) -> Any:
        """Find out once per step which references act, and keep the negative alive at cfg 1 where it is needed."""
        guider = executor.class_obj
        store = self._store(model_options, guider.inner_model)
        store.begin_step()
        active = store.active_at(timestep)
        options = _with_transformer_options(model_options, {RUN: store, ACTIVE: active})
        needs_third = active and options.get(GUIDANCE, self.applied.guidance).needs_unconditional
        if needs_third:
            options[UNCONDITIONAL] = getattr(guider, "conds", {}).get(UNCONDITIONAL)
            options["disable_cfg1_optimization"] = True
        result = executor(x, timestep, options, seed)
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
    ) -> Any:
        """Mark which rows see the references, add the prediction without them and fold three into two."""
        store = self._store(model_options, model)
        active = model_options.get("transformer_options", {}).get(ACTIVE)
        if active is None:
            active = store.active_at(timestep)
        if not active:
            return executor(model, _without_gates(conds), x, timestep, model_options)
        guidance = model_options.get(GUIDANCE, self.applied.guidance)
        options = _with_transformer_options(model_options, {RUN: store, ACTIVE: active})
        regions = store.region_conds(active, x)
        negative_is_off = len(conds) == 2 and guidance.mode == "joint"
        marked = [
            cond and [_mark(c, not (negative_is_off and i == 1), regions) for c in cond]
            for i, cond in enumerate(conds)
        ]
        if len(conds) == 1 and _sees_reference(marked[0]):
            (nested,) = executor(model, marked, x, timestep, options)
            return [store.shift_nested(nested)]
        if len(conds) != 2 or None in conds or not guidance.needs_unconditional:
            store.is_unfolded = True
            return executor(model, marked, x, timestep, options)
        without = model_options.get(UNCONDITIONAL) or conds[1]
        # packs that index (cond, uncond)[i] must not meet our third list's index
        options["transformer_options"][RELABEL] = {2: 1}
        lists = [*marked, [_off_copy(cond, regions) for cond in without]]
        text, reference, plain = executor(model, lists, x, timestep, options)
        folded = fold_guidance(plain, reference, text, image_scale=guidance.image_scale)
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
        references = _prepare(active, self.applied, executor.class_obj, store, x.device, regions)
        _add_patches(options, references, store.row_index(is_on, x.device))
        with _uncompiled:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _store(self, model_options: dict[str, Any], base_model: Any) -> RunStore:
        """Return the store of the run, or one for this call where another node has left ``outer_sample`` out."""
        store = model_options.get("transformer_options", {}).get(RUN)
        return RunStore(self.applied, base_model.model_sampling) if store is None else store


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


def _prepare(
    active: Sequence[int],
    applied: Applied,
    base_model: Any,
    store: RunStore,
    device: torch.device,
    regions: dict[int, Tensor | None],
) -> dict[tuple[str, int], list[LayerReference]]:
    """Keys and values by ComfyUI's block id, computed on first use in a run."""
    loaded = base_model.current_patcher.get_additional_models_with_key(KEY)
    module_of = dict(zip(applied.patchers, loaded, strict=True))
    dtype = compute_dtype(base_model)
    references: dict[tuple[str, int], list[LayerReference]] = {}
    for index in active:
        use, fused = applied.uses[index].use, module_of[applied.uses[index].patcher].model
        for layer in fused.layers:
            key = (index, layer, device, dtype)
            if key not in store.prepared:
                store.prepared[key] = prepare_layer(
                    use, layer, fused[layer], device=device, dtype=dtype
                )
            reference = store.prepared[key]
            region = regions[index]
            if region is not None:
                reference = replace(reference, region=region[:, 0])  # -> (rows, height, width)
            references.setdefault(block_id(layer), []).append(reference)
    return references


def block_id(layer: str) -> tuple[str, int]:
    """Translate a canonical layer name to ComfyUI's block id: ``output_blocks.4.1`` to ``("output", 4)``."""
    part, number, *_ = layer.split(".")
    return ("middle", 0) if part == "middle_block" else (part.removesuffix("_blocks"), int(number))


def _add_patches(
    options: dict[str, Any],
    references: dict[tuple[str, int], list[LayerReference]],
    rows: Tensor | None,
) -> None:
    """Add two patches that together replace the self-attention's output with the adapters' result.

    The first, last of its list, keeps the output and returns zeros, so that the block leaves x as it is; the second, first of
    its list, then gets x itself and adds the result. Other packs' patches have run by then, whatever the node order.
    """
    kept: dict[tuple[str, int], Tensor] = {}

    def is_ours(extra: dict[str, Any]) -> bool:
        return extra.get("block_index", 0) == 0 and extra.get("block") in references

    def keep_output(n: Tensor, extra: dict[str, Any]) -> Tensor:
        if not is_ours(extra):
            return n
        kept[extra["block"]] = n
        return torch.zeros_like(n)

    def add_result(x: Tensor, extra: dict[str, Any]) -> Tensor:
        if not is_ours(extra):
            return x
        n = kept.pop(extra["block"])

        def attention(
            query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None
        ) -> Tensor:
            precision = extra.get("attn_precision")
            return optimized_attention(
                query,
                key,
                value,
                heads,
                mask=mask,
                attn_precision=precision,
                transformer_options=extra,
            )

        height, width = extra.get("activations_shape", (0, 0, 0, 0))[-2:]
        return x + blend_references(
            x,
            n,
            references[extra["block"]],
            heads=extra["n_heads"],
            size=(height, width),
            rows=rows,
            attention=attention,
        )

    patches = dict(options.get("patches", {}))
    patches["attn1_output_patch"] = [*patches.get("attn1_output_patch", []), keep_output]
    patches["middle_patch"] = [add_result, *patches.get("middle_patch", [])]
    options["patches"] = patches


class DreamCacheCFGGuider(comfy.samplers.CFGGuider):
    """CFG with METHOD.md's three-term rule and an image guidance of its own; the wrappers on the MODEL do the work."""

    def set_dreamcache(
        self, positive: Any, negative: Any, unconditional: Any, image_scale: float
    ) -> None:
        """Set the conditionings and the image guidance.

        Args:
            positive: Prompt, with the reference.
            negative: Negative text, with the reference.
            unconditional: Text of the prediction without reference, or ``None`` for the negative.
            image_scale: s_image of METHOD.md section 5.
        """
        conds = {"positive": positive, "negative": negative}
        if unconditional is not None:
            # the key is not one that ComfyUI knows, so the prompt type has to be said
            conds[UNCONDITIONAL] = [
                [text, {**options, "prompt_type": "negative"}] for text, options in unconditional
            ]
        self.inner_set_conds(conds)
        self.dreamcache_guidance = Guidance(image_scale=image_scale, mode="separate")
