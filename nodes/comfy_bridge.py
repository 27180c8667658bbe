"""ModelPatcher, wrappers and sigmas on the one side, plain core objects on the other.

The one file that knows ComfyUI's patch API. State lives in immutable values and in one store per
sampling run; no module is touched and nothing is kept in ``model_options``.
"""

import copy
import math
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.ops
import comfy.samplers
import torch
from comfy.conds import CONDRegular
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..dreamcache_core import AdapterSet, FusedAdapterSet, Guidance, Layout, ReferenceUse
from ..dreamcache_core.backends import layout_of
from ..dreamcache_core.guidance import fold_guidance
from ..dreamcache_core.injection import LayerReference, blend_references, prepare_layer

KEY = "dreamcache"
GATE = "dreamcache_gate"
ACTIVE = "dreamcache_active"
RELABEL = "dreamcache_relabel"
RUN = "dreamcache_run"
GUIDANCE = "dreamcache_guidance"
UNCONDITIONAL = "dreamcache_unconditional"

_WRAPPERS = (
    WrappersMP.OUTER_SAMPLE,
    WrappersMP.PREPARE_SAMPLING,
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
)
_fused: "WeakKeyDictionary[AdapterSet, dict[torch.dtype, ModelPatcher]]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class AppliedUse:
    """One Apply node's reference.

    Attributes:
        use: The reference with its adapters, scale and region.
        patcher: ModelPatcher of the adapters, as the Apply node made it.
        start_sigma: Noise level from which on it acts, inclusive.
        end_sigma: Noise level down to which it acts, exclusive.
    """

    use: ReferenceUse
    patcher: ModelPatcher
    start_sigma: float
    end_sigma: float

    @property
    def is_always_on(self) -> bool:
        """Whether the range covers every step, so that no sigma has to be read."""
        return self.end_sigma <= 0 and self.start_sigma > 1e6


@dataclass(frozen=True, eq=False)
class Applied:
    """Everything that the Apply nodes up to here have put on a MODEL; immutable, shared by clones."""

    uses: tuple[AppliedUse, ...]
    guidance: Guidance

    @property
    def patchers(self) -> list[ModelPatcher]:
        """The adapters' ModelPatchers, each once."""
        return list(dict.fromkeys(applied.patcher for applied in self.uses))

    def active_at(self, timestep: Tensor) -> tuple[int, ...]:
        """Indices of the uses whose range holds a noise level; it is read back only where a range needs it.

        Args:
            timestep: Sigma of each row, (rows,), all equal.
        """
        if all(use.is_always_on for use in self.uses):
            return tuple(range(len(self.uses)))
        sigma = float(timestep.flatten()[0])
        return tuple(i for i, u in enumerate(self.uses) if u.end_sigma < sigma <= u.start_sigma)


class RunStore:
    """What one sampling run needs at each step, computed once: keys and values, and row indices on the device."""

    def __init__(self) -> None:
        self.prepared: dict[tuple[Any, ...], LayerReference] = {}
        self.rows: dict[tuple[Any, ...], Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunStore":
        """Return the same store: ComfyUI copies options at every step."""
        return self

    def row_index(self, is_on: tuple[bool, ...], device: torch.device) -> Tensor | None:
        """Indices of the rows that are on, int64; ``None`` where all are."""
        if all(is_on):
            return None
        if (is_on, device) not in self.rows:
            self.rows[is_on, device] = torch.tensor(is_on).nonzero().flatten().to(device)
        return self.rows[is_on, device]

    def clear(self) -> None:
        """Forget everything."""
        self.prepared.clear()
        self.rows.clear()


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


def adapter_patcher(adapters: AdapterSet, dtype: torch.dtype) -> ModelPatcher:
    """Fuse adapters for generation and hand them to ComfyUI's memory management; once per set and type.

    Args:
        adapters: The adapters.
        dtype: Float type that the model computes in.

    Returns:
        A ModelPatcher around a ``FusedAdapterSet`` made of ``comfy.ops.manual_cast`` layers.
    """
    by_dtype = _fused.setdefault(adapters, {})
    if dtype not in by_dtype:
        by_dtype[dtype] = _new_patcher(adapters.fuse(comfy.ops.manual_cast, dtype))
    return by_dtype[dtype]


def _new_patcher(fused: FusedAdapterSet) -> ModelPatcher:
    patcher = ModelPatcher(
        fused,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # lets a ComfyUI that samples on several devices make a copy for each of them
    patcher.cached_patcher_init = (_copy_patcher, (fused,))
    return patcher


def _copy_patcher(fused: FusedAdapterSet) -> ModelPatcher:
    return _new_patcher(copy.deepcopy(fused))


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
    sampling = model.get_model_object("model_sampling")
    applied_use = AppliedUse(
        use,
        patcher,
        _float32(sampling.percent_to_sigma(start_percent)),
        _float32(sampling.percent_to_sigma(end_percent)),
    )
    applied = Applied((*(before.uses if before else ()), applied_use), guidance)
    clone = model.clone()
    remove_references(clone)
    clone.set_attachments(KEY, applied)
    acting = replace(applied, uses=tuple(u for u in applied.uses if u.use.is_active))
    if acting.uses:
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
    return [[text, _with_gate(options, use_reference)] for text, options in conditioning]


def _with_gate(cond: dict[str, Any], is_on: bool, *, keep: bool = False) -> dict[str, Any]:
    model_conds = cond.get("model_conds", {})
    if keep and GATE in model_conds:
        return cond
    # integers are left alone by ComfyUI's casts, and a tensor travels with its row through every re-batching
    gate = CONDRegular(torch.tensor([[int(is_on)]], dtype=torch.long))
    return {**cond, "model_conds": {**model_conds, GATE: gate}}


def _without_gate(cond: dict[str, Any]) -> dict[str, Any]:
    model_conds = cond.get("model_conds", {})
    if GATE not in model_conds:
        return cond
    return {**cond, "model_conds": {k: v for k, v in model_conds.items() if k != GATE}}


def _without_gates(conds: list[Any]) -> list[Any]:
    return [None if cond is None else [_without_gate(item) for item in cond] for cond in conds]


def _off_copy(cond: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a conditioning that sees no reference, with an identity of its own that does not change."""
    off = _with_gate(cond, False)
    if isinstance(cond.get("uuid"), uuid.UUID):
        off["uuid"] = uuid.uuid5(cond["uuid"], "dreamcache-off")
    return off


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

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep a store for the keys and values of this run, and empty it whatever happens."""
        guider, store = executor.class_obj, RunStore()
        original = guider.model_options
        guider.model_options = _with_transformer_options(original, {RUN: store})
        guider.model_options[GUIDANCE] = getattr(guider, GUIDANCE, self.applied.guidance)
        try:
            return executor(*args, **kwargs)
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
        active = self.applied.active_at(timestep)
        options = _with_transformer_options(model_options, {ACTIVE: active})
        if active and options.get(GUIDANCE, self.applied.guidance).needs_unconditional:
            options[UNCONDITIONAL] = getattr(executor.class_obj, "conds", {}).get(UNCONDITIONAL)
            options["disable_cfg1_optimization"] = True
        return executor(x, timestep, options, seed)

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
        active = model_options.get("transformer_options", {}).get(ACTIVE)
        if active is None:
            active = self.applied.active_at(timestep)
        if not active:
            return executor(model, _without_gates(conds), x, timestep, model_options)
        guidance = model_options.get(GUIDANCE, self.applied.guidance)
        options = _with_transformer_options(model_options, {ACTIVE: active})
        is_pair = len(conds) == 2 and None not in conds
        gated = _gate_lists(conds, negative_is_off=is_pair and guidance.mode == "joint")
        if not (is_pair and guidance.needs_unconditional):
            return executor(model, gated, x, timestep, options)
        without = model_options.get(UNCONDITIONAL) or conds[1]
        # packs that index (cond, uncond)[i] must not meet our third list's index
        options["transformer_options"][RELABEL] = {2: 1}
        lists = [*gated, [_off_copy(cond) for cond in without]]
        text, reference, plain = executor(model, lists, x, timestep, options)
        return list(fold_guidance(plain, reference, text, image_scale=guidance.image_scale))

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
        active = options.pop(ACTIVE, None)
        if active is None:
            active = self.applied.active_at(t)
        store = options.pop(RUN, None) or RunStore()
        relabel = options.pop(RELABEL, {})
        if relabel and "cond_or_uncond" in options:
            options["cond_or_uncond"] = [relabel.get(i, i) for i in options["cond_or_uncond"]]
        is_on = (True,) * len(x) if gate is None else tuple(g != 0 for g in gate.flatten().tolist())
        if not (active and any(is_on)):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        references = _prepare(active, self.applied, executor.class_obj, store, x.device)
        _add_patches(options, references, store.row_index(is_on, x.device))
        with _uncompiled:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def _with_transformer_options(options: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = create_model_options_clone(options)
    merged["transformer_options"] = {**merged.get("transformer_options", {}), **extra}
    return merged


def _gate_lists(conds: list[Any], *, negative_is_off: bool) -> list[Any]:
    return [
        None
        if cond is None
        else [_with_gate(c, not (negative_is_off and i == 1), keep=True) for c in cond]
        for i, cond in enumerate(conds)
    ]


def _shape_to_reserve(
    uses: Sequence[AppliedUse], guidance: Guidance, model: ModelPatcher, shape: Sequence[int]
) -> list[int]:
    """Enlarge the batch that ComfyUI estimates memory for: a third row per image, and the keys and values."""
    rows = shape[0] * (1.5 if guidance.needs_unconditional else 1.0)
    element = compute_dtype(model.model).itemsize
    kv_bytes = sum(
        2 * feature.numel() * element
        for applied_use in uses
        for feature in applied_use.use.reference.features.values()
    )
    per_row = model.model.memory_required([1, *shape[1:]])
    return [math.ceil(rows + kv_bytes / max(per_row, 1.0)), *shape[1:]]


def _prepare(
    active: Sequence[int],
    applied: Applied,
    base_model: Any,
    store: RunStore,
    device: torch.device,
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
            references.setdefault(block_id(layer), []).append(store.prepared[key])
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
            num_images=len(x) // max(len(extra.get("cond_or_uncond", ())), 1),
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
