"""Adapters as a U-Net can run with them: fused, on its device, in its float type, each set once."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..method.adapter import AdapterModules, AdapterSet
from ..method.blending import ReferenceUse


class FusedAdapters:
    """Keeps what was fused as long as its adapters live."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[AdapterModules, _Fused] = WeakKeyDictionary()

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
        known = self._known.get(adapters)
        if known is None or not known.is_of(adapters, target):
            weights = [parameter.detach().clone() for parameter in adapters.parameters()]
            known = _Fused(weights, target, _fuse(adapters, *target))
            self._known[adapters] = known
        # not dataclasses.replace: the use was checked before, its warnings need no repeating
        changed = copy.copy(use)
        object.__setattr__(changed, "adapters", known.adapters)
        return changed


@dataclass(frozen=True, eq=False)
class _Fused:
    """Fused adapters, what they are for, and a copy of the weights that they were made from.

    Weights are compared by value: counters of changes miss fused optimizers and whatever else writes past autograd.
    """

    weights: Sequence[Tensor]
    target: tuple[torch.device, torch.dtype]
    adapters: AdapterModules

    def is_of(self, adapters: AdapterModules, target: tuple[torch.device, torch.dtype]) -> bool:
        pairs = zip(self.weights, adapters.parameters(), strict=True)
        return self.target == target and all(
            (one.device, one.dtype) == (other.device, other.dtype) and torch.equal(one, other)
            for one, other in pairs
        )


def _fuse(adapters: AdapterModules, device: torch.device, dtype: torch.dtype) -> AdapterModules:
    if isinstance(adapters, AdapterSet):
        return adapters.fuse(dtype=dtype).to(device)
    return copy.deepcopy(adapters).to(device, dtype)
