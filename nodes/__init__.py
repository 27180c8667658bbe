"""The nodes of the pack. ComfyUI's face; the mathematics is in ``dreamcache_core``."""

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError as error:
    raise ImportError(
        "DreamCache needs ComfyUI 0.3.64 or newer (nodes of the V3 schema); this ComfyUI is older. Update ComfyUI."
    ) from error

from . import adapters, apply, demo, reference, reference_files, training
from .folders import register_folders


class DreamCacheExtension(ComfyExtension):
    """The pack, as ComfyUI loads it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List the node classes."""
        modules = (adapters, reference, reference_files, apply, training, demo)
        return [node for module in modules for node in module.NODES]


async def comfy_entrypoint() -> DreamCacheExtension:
    """Register the model folder and return the extension."""
    register_folders()
    return DreamCacheExtension()
