"""Which rows of a batch see the references: a tensor in the conditioning, which travels with its row."""

import uuid
from typing import Any

import torch
from comfy.conds import CONDNoiseShape, CONDRegular

GATE = "dreamcache_gate"


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
        [text, _without_gate(options) if use_reference else mark(options, False, {}, force=True)]
        for text, options in conditioning
    ]


def mark(
    cond: dict[str, Any], is_on: bool, regions: dict[str, CONDNoiseShape], *, force: bool = False
) -> dict[str, Any]:
    """Add to a conditioning whether its rows see the references, unless it says so itself, and where."""
    model_conds = {**cond.get("model_conds", {}), **regions}
    if force or GATE not in model_conds:
        # integers are left alone by ComfyUI's casts; a tensor travels with its row through every re-batching
        model_conds[GATE] = CONDRegular(torch.tensor([[int(is_on)]], dtype=torch.long))
    return {**cond, "model_conds": model_conds}


def sees_reference(marked: list[dict[str, Any]]) -> bool:
    """Whether all texts of a marked list see the references."""
    return all(bool(cond["model_conds"][GATE].cond.any()) for cond in marked)


def _without_gate(cond: dict[str, Any]) -> dict[str, Any]:
    model_conds = cond.get("model_conds", {})
    if GATE not in model_conds:
        return cond
    return {**cond, "model_conds": {k: v for k, v in model_conds.items() if k != GATE}}


def without_gates(conds: list[Any]) -> list[Any]:
    """Return lists of conditionings without marks, as plain ComfyUI has them; what has none is passed on as it is."""
    return [None if cond is None else [_without_gate(item) for item in cond] for cond in conds]


def off_copy(cond: dict[str, Any], regions: dict[str, CONDNoiseShape]) -> dict[str, Any]:
    """Return a copy of a conditioning that sees no reference, with an identity of its own that does not change."""
    off = mark(cond, False, regions, force=True)
    if isinstance(cond.get("uuid"), uuid.UUID):
        off["uuid"] = uuid.uuid5(cond["uuid"], "dreamcache-off")
    return off
