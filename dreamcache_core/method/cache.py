"""``ReferenceCache``: the features of one or several reference images, an immutable value."""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..config import check_range
from ..errors import FileFormatError, InputError, MismatchError
from ..files.tensor_file import is_finite, read_tensor_file, shorten, write_tensor_file
from .layers import Layout, check_layer_names

FORMAT = "reference/1"

LATENT_FACTOR = 8
"""Pixels of an image's side for one of its latent, of all VAEs here."""

MAX_LATENT_SIDE = 2**13


@dataclass(frozen=True, eq=False)
class ReferenceCache:
    """Features of reference images at the cached layers of one U-Net.

    Immutable: every method returns a new object. Source: METHOD.md section 3.

    Attributes:
        features: Feature map entering each cached layer, (references, channels, height, width), by canonical layer
            name in execution order.
        context_width: Channels of the U-Net's text states; with the layers it tells which models fit.
        latent_size: Height and width of the reference latents.
        timestep: Training index of the pass, 0 to 999.
        seed: Seed of the noise, or ``None`` where the caller made the noise.
        masks: Tokens of the subject by layer, bool (references, height, width); ``None``: all tokens.
        thumbnails: A small image of each reference, as ``images.sheets.encode_thumbnails`` makes them, or none at all.
    """

    features: Mapping[str, Tensor]
    context_width: int
    latent_size: tuple[int, int]
    timestep: int = 1
    seed: int | None = None
    masks: Mapping[str, Tensor] | None = None
    thumbnails: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        """Check shapes and freeze the mappings.

        Raises:
            InputError: No layer, differing numbers of references, masks or thumbnails that do not fit the features, or a
                number out of range.
        """
        object.__setattr__(self, "features", MappingProxyType(dict(self.features)))
        if self.masks is not None:
            object.__setattr__(self, "masks", MappingProxyType(dict(self.masks)))
        self._check_features()
        self._check_masks()
        if len(self.thumbnails) not in (0, self.num_references):
            raise InputError(
                f"Expected a thumbnail for each reference or none; given {len(self.thumbnails)} thumbnails for "
                f"{self.num_references} references."
            )
        check_range("context_width", self.context_width, 1)
        check_range("timestep", self.timestep, 0, 999)
        sizes = [feature.shape[2:] for feature in self.features.values()]
        for axis, side in enumerate(self.latent_size):
            check_range("latent_size", side, max(size[axis] for size in sizes), MAX_LATENT_SIDE)

    def _check_features(self) -> None:
        if not self.features:
            raise InputError(
                "A reference cache needs the features of at least one layer; none was given."
            )
        shapes = {name: tuple(f.shape) for name, f in self.features.items()}
        is_float = all(feature.is_floating_point() for feature in self.features.values())
        fits = is_float and all(len(shape) == 4 and min(shape) > 0 for shape in shapes.values())
        if not fits or len({shape[0] for shape in shapes.values()}) != 1:
            raise InputError(
                "Features must be (references, channels, height, width), float, with the same number of references in "
                f"every layer; given {shapes}."
            )

    def _check_masks(self) -> None:
        if self.masks is None:
            return
        wanted = {n: (f.shape[0], *f.shape[2:]) for n, f in self.features.items()}
        given = {n: tuple(m.shape) for n, m in self.masks.items()}
        if wanted != given or any(m.dtype != torch.bool for m in self.masks.values()):
            raise InputError(f"Masks must be bool of shapes {wanted}; given {given}.")
        if not all(bool(mask.flatten(1).any(dim=1).all()) for mask in self.masks.values()):
            raise InputError(
                "A reference mask must leave at least one token of the subject; it is empty."
            )

    @property
    def layout(self) -> Layout:
        """What models and adapters this cache fits."""
        return Layout(self.context_width, {n: f.shape[1] for n, f in self.features.items()})

    @property
    def layers(self) -> tuple[str, ...]:
        """Canonical names of the cached layers, in execution order."""
        return tuple(self.features)

    @property
    def family(self) -> str:
        """Model family that the cache was made with."""
        return self.layout.family

    @property
    def num_references(self) -> int:
        """Number of reference images."""
        return next(iter(self.features.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        masks = self.masks or {}
        return sum(tensor.nbytes for tensor in (*self.features.values(), *masks.values()))

    def get_ram_usage(self) -> int:
        """Bytes in main memory, for the output cache of ComfyUI 0.8 (``--cache-ram``); newer ones count bare tensors only."""
        return self.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceCache:
        """Return the same object: it cannot change."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Let ``pickle``, ``torch.save`` and other processes have a copy."""
        values = [getattr(self, field.name) for field in fields(self)]
        return type(self), tuple(dict(v) if isinstance(v, Mapping) else v for v in values)  # pyright: ignore[reportUnknownArgumentType]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ReferenceCache:
        """Return a cache with its features on another device or in another float type.

        Args:
            device: Target device, or ``None`` to keep it.
            dtype: Target float type, or ``None`` to keep it.
        """
        masks = self.masks and {name: mask.to(device) for name, mask in self.masks.items()}
        features = {n: f.to(device=device, dtype=dtype) for n, f in self.features.items()}
        return replace(self, features=features, masks=masks)

    def split(self) -> list[ReferenceCache]:
        """Return a cache for each image, in order; ``concatenate`` puts them together again."""
        return [
            replace(
                self,
                features={n: f[i : i + 1] for n, f in self.features.items()},
                masks=self.masks and {n: m[i : i + 1] for n, m in self.masks.items()},
                thumbnails=self.thumbnails[i : i + 1],
            )
            for i in range(self.num_references)
        ]

    def rounding_error(self, dtype: torch.dtype) -> float:
        """Say what another float type would lose: root mean square of the rounding, in shares of the features' own.

        Args:
            dtype: The float type.

        Returns:
            The largest of all layers; infinite where a feature is beyond the type's range.
        """
        errors = [
            (f.to(dtype).double() - f.double()).norm() / f.double().norm()
            for f in self.features.values()
        ]
        return float(torch.stack(errors).nan_to_num(torch.inf, torch.inf).max())

    @staticmethod
    def concatenate(caches: Sequence[ReferenceCache]) -> ReferenceCache:
        """Join several images of one subject: every image attends to the tokens of all of them.

        Args:
            caches: At least one; same model, layers, timestep and latent size.

        Returns:
            A cache with the references of all, in order. Its seed is that of all, or ``None`` where they differ.

        Raises:
            InputError: The sequence is empty.
            MismatchError: The caches differ in model, layers, timestep or size; the message names both.
        """
        if not caches:
            raise InputError("Give at least one reference to combine; none was given.")
        first = caches[0]
        for number, other in enumerate(caches[1:], start=2):
            if first._signature() != other._signature():
                is_other = first.layers != other.layers
                raise MismatchError(
                    f"References 1 and {number} cannot be combined: {first.describe()}; {other.describe()}"
                    f"{', of other layers' if is_other else ''}. Prepare them at one size and encode them with one model at one timestep."
                )
        layers = first.layers
        features = {n: torch.cat([c.features[n] for c in caches]) for n in layers}
        masks = None
        if any(c.masks is not None for c in caches):
            masks = {n: torch.cat([c._mask_or_all(n) for c in caches]) for n in layers}
        seed = first.seed if all(c.seed == first.seed for c in caches) else None
        known = all(c.thumbnails for c in caches)
        thumbnails = tuple(one for c in caches for one in c.thumbnails) if known else ()
        return replace(first, features=features, masks=masks, seed=seed, thumbnails=thumbnails)

    def describe(self) -> str:
        """One line for messages and reports: images, their size in pixels, model family and memory."""
        height, width = (LATENT_FACTOR * side for side in self.latent_size)
        family = self.layout.describe().replace("Stable Diffusion", "SD")
        size_mb = self.nbytes / 1e6
        parts = [
            f"{self.num_references} image{'s' if self.num_references > 1 else ''}",
            f"{width} x {height}",
            family,
            f"{size_mb:.0f} MB" if size_mb >= 10 else f"{max(size_mb, 0.1):.1f} MB",
        ]
        if self.timestep != 1:
            parts.append(f"timestep {self.timestep}")
        return ", ".join(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file.

        Args:
            path: Target file; its folder must exist.

        Raises:
            InputError: The folder does not exist or cannot be written to.
        """
        tensors = {f"features.{name}": feature for name, feature in self.features.items()}
        for name, mask in (self.masks or {}).items():
            tensors[f"masks.{name}"] = mask
        metadata = {
            "format": FORMAT,
            "family": self.family,
            "context_width": str(self.context_width),
            "layers": json.dumps(self.layers),
            "timestep": str(self.timestep),
            "latent_size": json.dumps(self.latent_size),
            "seed": json.dumps(self.seed),
            "thumbnails": json.dumps([b64encode(one).decode() for one in self.thumbnails]),
        }
        write_tensor_file(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mapped: bool = False) -> ReferenceCache:
        """Read a cache that ``save`` wrote.

        Args:
            path: The file.
            mapped: Whether the features stay in the file and are read when used. Nobody else may write to it then.

        Returns:
            The cache, on the CPU.

        Raises:
            FileFormatError: The file is damaged or no saved reference.
        """
        tensors, metadata = read_tensor_file(path, FORMAT, mapped=mapped)
        try:
            layers = check_layer_names(json.loads(metadata["layers"]))
            height, width = json.loads(metadata["latent_size"])
            masks = {n: tensors.pop(f"masks.{n}") for n in layers if f"masks.{n}" in tensors}
            features = {n: tensors.pop(f"features.{n}") for n in layers}
            if not all(is_finite(feature) for feature in features.values()):
                raise InputError("features with NaN or infinite values")
            seed = json.loads(metadata["seed"])
            if isinstance(seed, bool) or not isinstance(seed, int | None):
                raise InputError("a seed that is no number")
            if tensors:
                raise InputError(f"unknown tensors {shorten(sorted(tensors))}")
            return cls(
                features=features,
                context_width=int(metadata["context_width"]),
                latent_size=(int(height), int(width)),
                timestep=int(metadata["timestep"]),
                seed=seed,
                masks=masks or None,
                thumbnails=tuple(
                    b64decode(one) for one in json.loads(metadata.get("thumbnails", "[]"))
                ),
            )
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise FileFormatError(
                f"{path} is not a complete saved reference ({error}). Save it again with Save Reference."
            ) from error

    def _signature(self) -> tuple[Any, ...]:
        return self.context_width, dict(self.layout.channels), self.timestep, self.latent_size

    def _mask_or_all(self, layer: str) -> Tensor:
        if self.masks is not None:
            return self.masks[layer]
        feature = self.features[layer]
        return torch.ones(
            (feature.shape[0], *feature.shape[2:]), dtype=torch.bool, device=feature.device
        )
