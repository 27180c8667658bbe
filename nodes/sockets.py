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


MAX_SIDE_PX = 2048
"""Of the images that references are made of."""

DEFAULT_GUIDANCE = 1.0
"""Of the pull towards the reference."""

SUBJECT = ("subject", "character", "identity", "reference", "likeness")
"""Words for what the pack is about."""
PERSONALIZE = (
    "personalize",
    "personalise",
    "dreambooth",
    "ip adapter",
    "ipadapter",
    "consistent character",
    *SUBJECT,
)
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


def square_inputs(size: int) -> list[io.Input]:
    """Declare the square that images are prepared on; by default of this size."""
    return [
        io.Int.Input(
            "size",
            default=size,
            min=0,
            max=MAX_SIDE_PX,
            step=8,
            tooltip="Side of the square in pixels: 512 for Stable Diffusion 1.x and 2.x-base, 1024 for SDXL. 0: the model's own.",
        ),
        io.Float.Input(
            "fill",
            default=0.85,
            min=0.05,
            max=1.0,
            step=0.01,
            tooltip="How large the subject stands in the square: 1 touches the border. Best from 0.7 to 1, as in training.",
        ),
    ]


def adapters_input() -> io.Input:
    """Declare the adapters that a reference is made for."""
    return Adapters.Input(
        "adapters",
        optional=True,
        tooltip="The adapters that the reference is for. Without them it serves trained ones of the paper's kind.",
    )
