"""Put adapters into a U-Net and take them out again, by hooks; the mathematics is in ``blending``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..errors import InputError, StateError
from .backends import require_fit, select_sites
from .blending import LayerReference, ReferenceUse, blend_references, prepare_layer
from .compiling import OwnClass, is_compiled, plain_module
from .layers import AttentionSite

_injected: "WeakSet[nn.Module]" = WeakSet()
_compilable: "WeakKeyDictionary[nn.Module, dict[str, _Site]]" = WeakKeyDictionary()


@contextmanager
def inject(
    unet: nn.Module,
    uses: ReferenceUse | Sequence[ReferenceUse],
    *,
    rows: Sequence[bool] | Tensor | None = None,
) -> Iterator["Injection"]:
    """Run a U-Net with references: inside the context ``unet(...)`` sees them.

    Leaves nothing behind, also on exceptions. Keys and values are computed once per context while gradients are off.
    When training keep the context open until after ``backward``: activation checkpointing runs blocks again.

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel``, not compiled.
        uses: One or several uses.
        rows: Which batch rows see the references, bool (batch,); ``None``: all. Rows that are off equal the plain
            U-Net on the same batch bit for bit.

    Yields:
        What can choose other rows for the calls to come.

    Raises:
        InputError: ``rows`` is no list of bools, or of another length than the batch.
        MismatchError: A use was made for another model.
        StateError: The U-Net already has references injected, or is compiled.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    unet = _usable(unet)
    uses = (uses,) if isinstance(uses, ReferenceUse) else tuple(uses)
    for use in uses:
        require_fit(unet, use.adapters.info.layout, "the adapters are for")
    if unet in _injected:
        raise StateError(
            "This U-Net already has references injected. Leave the other inject context first, or give all uses "
            "to one call."
        )
    active = [use for use in uses if use.is_active]
    layers = tuple(dict.fromkeys(layer for use in active for layer in use.adapters.layers))
    injection = Injection(rows)
    _injected.add(unet)
    try:
        with _sites(unet, layers) as sites:
            for site in sites:
                site.uses = _LayerUses(site.name, active, injection)
                if unet in _compilable and not torch.is_grad_enabled():
                    site.uses.prepare_ahead()
            yield injection
    finally:
        _injected.discard(unet)


def prepare_for_compile(unet: nn.Module, layers: Sequence[str] | None = None) -> None:
    """Let ``inject`` work on a U-Net that is compiled afterwards by ``torch.compile``, as a whole or in parts.

    Hooks that come after compiling are ignored, so these come before it and stay; they do nothing while no reference
    is injected. Other references, adapters and scales of the same shapes need no compiling anew.

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel``, not compiled yet.
        layers: Canonical names of the adapters' layers; ``None`` takes METHOD.md's rule.

    Raises:
        MismatchError: The U-Net has no layer of that name.
        StateError: The U-Net is compiled already, or has references injected.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    if is_compiled(unet) or unet in _injected:
        raise StateError(
            "Expected a U-Net that is not compiled and has no references injected. Call prepare_for_compile first, "
            "then torch.compile, then inject."
        )
    for site in _compilable.pop(unet, {}).values():
        site.remove()
    _compilable[unet] = {name: _Site(site) for name, site in select_sites(unet, layers).items()}


def _usable(unet: nn.Module) -> nn.Module:
    """Return the module that is to get hooks, or has got them before it was compiled."""
    plain = plain_module(unet)
    if is_compiled(unet) and plain not in _compilable:
        raise StateError(
            "Expected the plain U-Net, given one compiled by torch.compile (or holding compiled blocks), which would "
            "ignore hooks. Call prepare_for_compile(unet) before you compile it, or pass the original module "
            "(unet._orig_mod)."
        )
    return plain


@contextmanager
def _sites(unet: nn.Module, layers: tuple[str, ...]) -> Iterator[list["_Site"]]:
    """Hooks at the layers: those that a U-Net was compiled with, or new ones, taken out at exit."""
    known = _compilable.get(unet)
    if known is None:
        sites = [_Site(site) for site in select_sites(unet, layers).values()] if layers else []
        end = _Site.remove
    elif missing := [layer for layer in layers if layer not in known]:
        raise StateError(
            f"The U-Net was prepared for compiling with the layers {', '.join(known)}; these adapters need "
            f"{', '.join(missing)}. Give prepare_for_compile the adapters' layers."
        )
    else:
        sites = [known[layer] for layer in layers]
        end = _Site.end
    try:
        yield sites
    finally:
        for site in sites:
            end(site)


class Injection:
    """Which batch rows see the references while ``inject`` is open.

    Args:
        rows: As ``inject`` takes them.
    """

    def __init__(self, rows: Sequence[bool] | Tensor | None = None) -> None:
        self.choose_rows(rows)

    def choose_rows(self, rows: Sequence[bool] | Tensor | None) -> None:
        """Choose the rows of the calls to come; keys and values stay as they are.

        Args:
            rows: Bool (batch,), or ``None`` for all.

        Raises:
            InputError: It is no list of bools.
        """
        self._index, self.num_rows = None, None
        if rows is not None:
            rows = torch.as_tensor(rows)
            if rows.ndim != 1 or rows.dtype != torch.bool:
                raise InputError(
                    f"rows must be one bool per batch row, not indices; given {rows.tolist()} of {rows.dtype}."
                )
            self._index, self.num_rows = rows.nonzero().flatten(), len(rows)

    def index_on(self, device: torch.device) -> Tensor | None:
        """Indices of the rows that see the references, int64; ``None`` for all. Copied to a device once."""
        if self._index is not None:
            self._index = self._index.to(device)
        return self._index


class _Site:
    """The hooks at one attention module, and what they hand to each other within one forward pass.

    While it has no ``uses`` they change nothing.
    """

    def __init__(self, site: AttentionSite) -> None:
        self.name, self.heads = site.name, site.heads
        self.uses: _LayerUses | None = None
        self.size = (0, 0)
        self.hidden_states: Tensor | None = None
        self.handles = [
            site.hook_input(self.read_size),
            site.block.norm1.register_forward_pre_hook(self.read_hidden_states),
            site.block.attn1.register_forward_hook(self.replace_output),
            *map(OwnClass, (site.module, site.block, site.block.norm1, site.block.attn1)),
        ]

    def end(self) -> None:
        self.uses = self.hidden_states = None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def read_size(self, feature: Tensor) -> None:
        self.size = (feature.shape[-2], feature.shape[-1])

    def read_hidden_states(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.hidden_states = args[0]

    def replace_output(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        x, self.hidden_states = self.hidden_states, None
        if self.uses is None:
            return output
        assert x is not None
        self.uses.check_rows(len(x))
        rows = self.uses.injection.index_on(x.device)
        if rows is not None and not len(rows):
            return output
        references = self.uses.references(x)
        return blend_references(x, output, references, heads=self.heads, size=self.size, rows=rows)


class _LayerUses:
    """The uses at one layer during one injection; each is projected to keys and values once."""

    def __init__(self, layer: str, uses: Sequence[ReferenceUse], injection: Injection) -> None:
        self.layer, self.injection = layer, injection
        self.uses = [use for use in uses if layer in use.adapters.layers]
        self.known: dict[tuple[Any, ...], list[LayerReference]] = {}
        self.is_compiled = False

    def check_rows(self, count: int) -> None:
        num_rows = self.injection.num_rows
        if num_rows is not None and num_rows != count:
            raise InputError(
                f"rows must have one entry per batch row: the batch has {count}, rows {num_rows}."
            )
        for use in self.uses:
            if use.per_row and count % use.reference.num_references:
                raise InputError(
                    "With per_row the batch must have one row for each reference, or a multiple of that: "
                    f"{count} rows, {use.reference.num_references} references."
                )

    def prepare_ahead(self) -> None:
        """Let compiled code find keys and values instead of computing them, where the adapters are."""
        self.is_compiled = True
        weight = next(self.uses[0].adapters[self.layer].parameters())
        self.references(weight)
        self.injection.index_on(weight.device)

    def references(self, x: Tensor) -> list[LayerReference]:
        """Keys and values for hidden states like these."""
        is_autocast = torch.is_autocast_enabled(x.device.type)
        if torch.is_grad_enabled():  # keys and values are part of the graph
            return self.prepare(x, is_autocast)
        key = (x.device, x.dtype if is_autocast else None)
        if key not in self.known:
            self.known[key] = self.prepare(x, is_autocast)
        return self.known[key]

    def prepare(self, x: Tensor, is_autocast: bool) -> list[LayerReference]:
        prepared: list[LayerReference] = []
        for use in self.uses:
            adapter = use.adapters[self.layer]
            dtype = x.dtype if is_autocast else next(adapter.parameters()).dtype
            prepared.append(
                prepare_layer(
                    use,
                    self.layer,
                    adapter,
                    device=x.device,
                    dtype=dtype,
                    is_compiled=self.is_compiled,
                )
            )
        return prepared
