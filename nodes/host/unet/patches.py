"""The adapters at work inside the U-Net's blocks: two patches, put in for one call."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ....dreamcache_core.method.blending import LayerReference, blend_references, prepare_layer
from ..applied import KEY
from ..model import compute_dtype
from ..run import RunStore
from .compiled import compile_settings


def prepare_references(
    active: Sequence[int],
    store: RunStore,
    base_model: Any,
    device: torch.device,
    regions: dict[int, Tensor | None],
) -> dict[tuple[str, int], list[LayerReference]]:
    """Keys and values of the active uses by ComfyUI's block id, with the regions of this call's rows."""
    references: dict[tuple[str, int], list[LayerReference]] = {}
    for index in active:
        region = regions[index]
        for layer, reference in prepare_use(index, store, base_model, device).items():
            if region is not None:
                reference = replace(reference, region=region[:, 0])  # -> (rows, height, width)
            references.setdefault(block_id(layer), []).append(reference)
    return references


def prepare_use(
    index: int, store: RunStore, base_model: Any, device: torch.device
) -> dict[str, LayerReference]:
    """Keys and values of one use by layer, computed once in a run."""
    applied, dtype = store.applied, compute_dtype(base_model.current_patcher)
    loaded = base_model.current_patcher.get_additional_models_with_key(KEY)
    module_of = dict(zip(applied.patchers, loaded, strict=True))
    use, fused = applied.uses[index].use, module_of[applied.uses[index].patcher].model
    key = (index, device, dtype)
    if key not in store.prepared:
        is_compiled = compile_settings(base_model) is not None
        store.prepared[key] = {
            layer: prepare_layer(
                use, layer, fused[layer], device=device, dtype=dtype, is_compiled=is_compiled
            )
            for layer in fused.layers
        }
    return store.prepared[key]


def block_id(layer: str) -> tuple[str, int]:
    """Translate a canonical layer name to ComfyUI's block id: ``output_blocks.4.1`` to ``("output", 4)``."""
    part, number, *_ = layer.split(".")
    return ("middle", 0) if part == "middle_block" else (part.removesuffix("_blocks"), int(number))


def add_patches(
    options: dict[str, Any],
    references: dict[tuple[str, int], list[LayerReference]],
    rows: Tensor | None,
) -> None:
    """Add two patches that together replace the self-attention's output with the adapters' result.

    The first, last of its list, keeps the output and returns zeros, so that the block leaves x as it is; the second, first of
    its list, then gets x itself and adds the result. Other packs' patches have run by then, whatever the node order.
    """
    kept: dict[tuple[str, int], Tensor] = {}

    def keep_output(n: Tensor, extra: dict[str, Any]) -> Tensor:
        if extra.get("block") not in references or extra.get("block_index", 0) != 0:
            return n
        kept[extra["block"]] = n
        return torch.zeros_like(n)

    def add_result(x: Tensor, extra: dict[str, Any]) -> Tensor:
        if extra.get("block") not in kept:
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
