"""DreamCache in pure PyTorch: reference-personalised images by features that a U-Net caches of its own reading."""

from typing import TYPE_CHECKING, Any

from .errors import (
    DreamCacheError,
    FileFormatError,
    InputError,
    MismatchError,
    MissingPackageError,
    StateError,
    UnsupportedModelError,
)
from .images.reference import prepare_reference_image
from .method.adapter import AdapterInfo, AdapterSet, FusedAdapterSet
from .method.adapter_files import load_adapters, save_adapters
from .method.blending import ReferenceUse
from .method.cache import ReferenceCache
from .method.capture import capture_features, capture_reference
from .method.guidance import Guidance, combine_guidance
from .method.injection import inject, prepare_for_compile
from .method.layers import Layout, family_of
from .version import __version__

if TYPE_CHECKING:
    from .pipeline.fitting import adapters_from_model
    from .pipeline.pipeline import DreamCachePipeline

__all__ = [
    "AdapterInfo",
    "AdapterSet",
    "DreamCacheError",
    "DreamCachePipeline",
    "FileFormatError",
    "FusedAdapterSet",
    "Guidance",
    "InputError",
    "Layout",
    "MismatchError",
    "MissingPackageError",
    "ReferenceCache",
    "ReferenceUse",
    "StateError",
    "UnsupportedModelError",
    "__version__",
    "adapters_from_model",
    "capture_features",
    "capture_reference",
    "combine_guidance",
    "family_of",
    "inject",
    "load_adapters",
    "prepare_for_compile",
    "prepare_reference_image",
    "save_adapters",
]


def __getattr__(name: str) -> Any:
    # these need diffusers, which is optional: it loads on first use
    if name == "DreamCachePipeline":
        from .pipeline.pipeline import DreamCachePipeline

        return DreamCachePipeline
    if name == "adapters_from_model":
        from .pipeline.fitting import adapters_from_model

        return adapters_from_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
