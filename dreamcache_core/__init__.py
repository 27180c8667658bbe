"""DreamCache in pure PyTorch: reference-personalised images by features that a U-Net caches of its own reading."""

from typing import TYPE_CHECKING, Any

from .adapter import AdapterInfo, AdapterSet, FusedAdapterSet
from .blending import ReferenceUse
from .cache import ReferenceCache
from .capture import capture_features, capture_reference
from .checkpoints import load_adapters, save_adapters
from .errors import (
    DreamCacheError,
    FileFormatError,
    InputError,
    MismatchError,
    MissingPackageError,
    StateError,
    UnsupportedModelError,
)
from .guidance import Guidance, combine_guidance
from .injection import inject, prepare_for_compile
from .layers import Layout, family_of
from .reference_image import prepare_reference_image

if TYPE_CHECKING:
    from .pipeline import DreamCachePipeline

__version__ = "0.1.0"

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
    # the pipeline needs diffusers, which is optional: it loads on first use
    if name == "DreamCachePipeline":
        from .pipeline import DreamCachePipeline

        return DreamCachePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
