"""Adapters as a U-Net can run with them: fused, on its device, in its float type, each set once."""

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..method.adapter import AdapterModules, AdapterSet
from ..method.blending import ReferenceUse


class FusedAdapters:
    """Keeps what was fused as long as its adapters live."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[AdapterModules, tuple[Any, AdapterModules]] = (
            WeakKeyDictionary()
        )

    def ready(self, use: ReferenceUse, *, device: torch.device, dtype: torch.dtype) -> ReferenceUse:
        """Give a use adapters that a U-Net can run with.

        Args:
            use: Its adapters may be of any kind, anywhere.
            device: Where the U-Net computes.
            dtype: Float type of the U-Net.

        Returns:
            The use itself, where its adapters are fit; else a copy with others.
        """
        adapters, target = use.adapters, (device, dtype)
        is_elsewhere = any((p.device, p.dtype) != target for p in adapters.parameters())
        if not isinstance(adapters, AdapterSet) and not is_elsewhere:
            return use
        state = (target, _state_of(adapters))
        known = self._known.get(adapters)
        if known is None or known[0] != state:
            known = self._known[adapters] = state, _fuse(adapters, device, dtype)
        # not dataclasses.replace: the use was checked before, its warnings need no repeating
        changed = copy.copy(use)
        object.__setattr__(changed, "adapters", known[1])
        return changed


def _fuse(adapters: AdapterModules, device: torch.device, dtype: torch.dtype) -> AdapterModules:
    if isinstance(adapters, AdapterSet):
        return adapters.fuse(dtype=dtype).to(device)
    return copy.deepcopy(adapters).to(device, dtype)


def _state_of(adapters: AdapterModules) -> tuple[int, ...]:
    """Tell apart the same adapters before and after a training step."""
    return tuple(0 if p.is_inference() else p._version for p in adapters.parameters())
