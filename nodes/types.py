"""Socket types of the pack."""

from comfy_api.latest import io

from ..dreamcache_core import AdapterSet, ReferenceCache


@io.comfytype(io_type="DREAMCACHE_ADAPTERS")
class Adapters(io.ComfyTypeIO):
    """Adapters as they were loaded."""

    Type = AdapterSet


@io.comfytype(io_type="DREAMCACHE_REFERENCE")
class Reference(io.ComfyTypeIO):
    """Cached features of one or several images of a subject."""

    Type = ReferenceCache
