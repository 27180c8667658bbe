"""Nodes that combine, save and load references."""

import torch
from comfy_api.latest import io, ui

from ..dreamcache_core import InputError, ReferenceCache
from ..dreamcache_core.images.sheets import read_thumbnails
from .host.folders import (
    check_choice,
    choice_state,
    is_listed,
    list_reference_files,
    new_reference_path,
    reference_path,
)
from .host.report import report
from .sockets import PERSONALIZE, SUBJECT, Reference, advanced, filename_prefix_input, found_by

AS_ENCODED = "as encoded"
DTYPES = {
    AS_ENCODED: None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
NOT_LISTED = (
    "Load Reference does not list this folder: begin filename_prefix with dreamcache/, or move the file to "
    "models/dreamcache/references. "
)


class CombineReferences(io.ComfyNode):
    """Join several images of one subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        more = [
            Reference.Input(
                f"reference_{i}", optional=True, tooltip="One more image of the same subject."
            )
            for i in range(3, 9)
        ]
        return io.Schema(
            node_id="DreamCacheCombineReferences",
            display_name="Combine References (DreamCache)",
            category="DreamCache",
            description="Joins several images of ONE subject into one reference. For several subjects use one Apply "
            "DreamCache for each instead.",
            **found_by("merge", "batch", "several images", *SUBJECT),
            inputs=[
                Reference.Input("reference_1", tooltip="An image of the subject."),
                Reference.Input(
                    "reference_2", tooltip="Another image of the same subject, of the same size."
                ),
                *more,
            ],
            outputs=[Reference.Output(display_name="reference", tooltip="All images together.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **references: ReferenceCache) -> io.NodeOutput:
        """Concatenate what is connected, in the order of the inputs."""
        given = [references[name] for name in sorted(references) if references[name] is not None]
        combined = ReferenceCache.concatenate(given)
        return io.NodeOutput(combined, ui=report(cls, combined.describe()))


class SaveReference(io.ComfyNode):
    """Write a reference below ComfyUI's output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheSaveReference",
            display_name="Save Reference (DreamCache)",
            category="DreamCache",
            description="Saves an encoded reference below ComfyUI's output folder, where Load Reference finds it.",
            **found_by("export", "keep", *SUBJECT),
            inputs=[
                Reference.Input(
                    "reference", tooltip="From Encode Reference or Combine References."
                ),
                filename_prefix_input("dreamcache/reference"),
                advanced(
                    io.Combo.Input(
                        "dtype",
                        options=list(DTYPES),
                        default=AS_ENCODED,
                        optional=True,
                        tooltip="float16 and bfloat16 halve the file of a float32 model; the node says how much is lost.",
                    )
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, reference: ReferenceCache, filename_prefix: str, dtype: str = AS_ENCODED
    ) -> io.NodeOutput:
        """Save it under a new name."""
        rounded, loss = _round(reference, dtype)
        with new_reference_path(filename_prefix) as path:
            rounded.save(path)
        hint = "" if is_listed(path) else NOT_LISTED
        return io.NodeOutput(ui=report(cls, f"{hint}{path}: {loss}{rounded.describe()}"))


class LoadReference(io.ComfyNode):
    """Read a saved reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheLoadReference",
            display_name="Load Reference (DreamCache)",
            category="DreamCache",
            description="Loads and shows a reference that Save Reference wrote, from the output or input folder or from "
            "models/dreamcache/references.",
            **found_by(*PERSONALIZE),
            inputs=[
                io.Combo.Input(
                    "reference",
                    options=list_reference_files(),
                    tooltip="Saved reference; the folder stands in brackets. Press R after saving a new one.",
                ),
            ],
            outputs=[Reference.Output(display_name="reference", tooltip="For Apply DreamCache.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, reference: str | None = None) -> bool | str:
        """Say where references belong when the file is not there."""
        return check_choice(reference_path, reference)

    @classmethod
    def fingerprint_inputs(cls, reference: str | None) -> str:
        """Run again when the file changes."""
        return choice_state(reference_path, reference)

    @classmethod
    def execute(cls, reference: str) -> io.NodeOutput:
        """Load the file."""
        loaded = ReferenceCache.load(reference_path(reference))
        shown = report(cls, loaded.describe()).as_dict()
        if loaded.thumbnails:
            sheet = read_thumbnails(loaded.thumbnails, reference)
            shown |= ui.PreviewImage(sheet, cls=cls).as_dict()
        return io.NodeOutput(loaded, ui=shown)


def _round(reference: ReferenceCache, name: str) -> tuple[ReferenceCache, str]:
    """Change the float type, and say what that loses."""
    dtype = DTYPES[name]
    if dtype is None:
        return reference, ""
    error = reference.rounding_error(dtype)
    if error == float("inf"):
        raise InputError(
            f"This reference has features beyond the range of {name}. Save it as bfloat16 or float32."
        )
    return reference.to(dtype=dtype), f"rounding error {error:.1e} of the features, "


NODES: list[type[io.ComfyNode]] = [CombineReferences, SaveReference, LoadReference]
