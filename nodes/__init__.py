"""The nodes of the pack. ComfyUI's face; the mathematics is in ``dreamcache_core``."""

# ruff: noqa: E402 - an older ComfyUI fails in one of these imports; the reason has to come first
from .version import require_this_comfyui

require_this_comfyui()

from comfy_api.latest import ComfyExtension, io

from . import (
    adapters,
    apply,
    attention_map,
    demo,
    guidance,
    photo,
    reference,
    reference_files,
    reference_folder,
    training,
)
from .host.folders import register_folders
from .host.report import shows_errors


class DreamCacheExtension(ComfyExtension):
    """The pack, as ComfyUI loads it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List the node classes."""
        modules = (
            photo,
            adapters,
            reference,
            reference_folder,
            reference_files,
            apply,
            guidance,
            attention_map,
            training,
            demo,
        )
        return [shows_errors(node) for module in modules for node in module.NODES]


async def comfy_entrypoint() -> DreamCacheExtension:
    """Register the model folder and return the extension."""
    register_folders()
    return DreamCacheExtension()
