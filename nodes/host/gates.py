"""Which rows of a batch see the references: a tensor in the conditioning, which travels with its row."""

import uuid
from typing import Any

import comfy.controlnet
import torch
from comfy.conds import CONDNoiseShape, CONDRegular

GATE = "dreamcache_gate"
ON, OFF, ADDED = 1, 0, -1
"""Values of the gate; ``ADDED`` is off, and of the list that we add to ComfyUI's two."""


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
        [text, _without_gate(options) if use_reference else _with_gate(options, OFF, {})]
        for text, options in conditioning
    ]


def mark(cond: dict[str, Any], is_on: bool, regions: dict[str, CONDNoiseShape]) -> dict[str, Any]:
    """Add to a conditioning whether its rows see the references, unless it says so itself, and where."""
    if GATE in cond.get("model_conds", {}):
        return {**cond, "model_conds": {**cond["model_conds"], **regions}}
    return _with_gate(cond, ON if is_on else OFF, regions)


def sees_reference(marked: list[dict[str, Any]]) -> bool:
    """Whether all texts of a marked list see the references."""
    return all(bool((cond["model_conds"][GATE].cond == ON).all()) for cond in marked)


def added_copy(cond: dict[str, Any], regions: dict[str, CONDNoiseShape]) -> dict[str, Any]:
    """Copy a conditioning for the prediction without references, with an identity of its own that does not change."""
    added = _with_gate(cond, ADDED, regions)
    if isinstance(cond.get("uuid"), uuid.UUID):
        added["uuid"] = uuid.uuid5(cond["uuid"], "dreamcache-off")
    return added


def without_gates(conds: list[Any]) -> list[Any]:
    """Return lists of conditionings without marks, as plain ComfyUI has them; what has none is passed on as it is."""
    return [None if cond is None else [_without_gate(item) for item in cond] for cond in conds]


def can_tell_rows(model_options: dict[str, Any], conds: list[Any]) -> bool:
    """Whether something of other nodes may tell rows apart by ``cond_or_uncond``, which numbers lists, where we add a third."""
    patches = model_options["transformer_options"]
    return (
        "model_function_wrapper" in model_options
        or bool(patches.get("patches") or patches.get("patches_replace"))
        or any(_is_foreign(item.get("control")) for cond in conds for item in cond or ())
    )


def _is_foreign(control: Any) -> bool:
    """Whether a ControlNet, or one before it, is of another pack; ComfyUI's own treat all rows alike."""
    while control is not None and type(control).__module__ == comfy.controlnet.__name__:
        control = control.previous_controlnet
    return control is not None


def _with_gate(
    cond: dict[str, Any], value: int, regions: dict[str, CONDNoiseShape]
) -> dict[str, Any]:
    # integers are left alone by ComfyUI's casts; a tensor travels with its row through every re-batching
    gate = CONDRegular(torch.tensor([[value]], dtype=torch.long))
    return {**cond, "model_conds": {**cond.get("model_conds", {}), **regions, GATE: gate}}


def _without_gate(cond: dict[str, Any]) -> dict[str, Any]:
    model_conds = cond.get("model_conds", {})
    if GATE not in model_conds:
        return cond
    return {**cond, "model_conds": {k: v for k, v in model_conds.items() if k != GATE}}
