"""The pack's socket types, and what its nodes declare alike."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..dreamcache_core import AdapterSet, ReferenceCache
from ..dreamcache_core.images.masks import MARKS


@io.comfytype(io_type="DREAMCACHE_ADAPTERS")
class Adapters(io.ComfyTypeIO):
    """Adapters as they were loaded."""

    Type = AdapterSet


@io.comfytype(io_type="DREAMCACHE_REFERENCE")
class Reference(io.ComfyTypeIO):
    """Cached features of one or several images of a subject."""

    Type = ReferenceCache


DEFAULT_GUIDANCE = 1.0
"""Of the pull towards the reference."""

SUBJECT = ("subject", "character", "identity", "reference")
"""Words for what the pack is about."""
PERSONALIZE = ("personalize", "personalise", "dreambooth", "ip adapter", "ipadapter", *SUBJECT)
"""Words for what it does, as other packs and papers name it."""


def found_by(*words: str) -> dict[str, Any]:
    """Words by which a search finds a node, as an argument of ``io.Schema``; nothing where that takes none."""
    known = {field.name for field in fields(io.Schema)}
    return {"search_aliases": list(words)} if "search_aliases" in known else {}


def advanced(given: io.Input) -> io.Input:
    """Hide an input until its node shows the advanced ones."""
    given.extra_dict = {"advanced": True}  # older hosts have no argument for it
    return given


def seed_input(tooltip: str) -> io.Int.Input:
    """Declare a seed that stays as it is from run to run."""
    return io.Int.Input(
        "seed", default=0, min=0, max=2**64 - 1, control_after_generate=False, tooltip=tooltip
    )


def percent_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """Declare a place in the run."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, tooltip=tooltip)


def image_guidance_input(tooltip: str) -> io.Float.Input:
    """Declare the strength of the pull towards the reference."""
    return io.Float.Input(
        "image_guidance", default=DEFAULT_GUIDANCE, min=0.0, max=20.0, step=0.05, tooltip=tooltip
    )


def mask_marks_input() -> io.Combo.Input:
    """Declare which way round a mask is."""
    return io.Combo.Input(
        "mask_marks",
        options=list(MARKS),
        default="auto",
        optional=True,
        tooltip="What 1 in the mask marks. 'auto': the background where it covers most of the border, else the subject; the node "
        "says what it did. 'subject' or 'background' where that is wrong.",
    )


def filename_prefix_input(default: str) -> io.String.Input:
    """Declare the name of a new file."""
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip="Name of the file, subfolders allowed; a number is added, nothing is overwritten.",
    )
