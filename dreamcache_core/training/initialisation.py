"""Adapters before their first training step: as PyTorch initialises them, or from the base model's self-attention."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import InputError, StateError
from ..method.adapter import AdapterInfo, AdapterSet, ReferenceAdapter
from ..method.backends import layout_of, select_sites

Init = Literal["identity", "paper", "sum", "self_attention"]

NUM_IMAGES = 256
"""References that are looked at; their tokens number thousands at the smallest layer."""

RIDGE = 1e-4
"""Added to the diagonal, in shares of its mean, for channels that hardly vary."""


def new_adapters(
    unet: nn.Module,
    *,
    init: Init = "identity",
    seed: int = 0,
    layers: Sequence[str] | None = None,
    timestep: int = 1,
    base_model: str = "",
    prediction: str = "epsilon",
) -> AdapterSet:
    """Make untrained adapters for a U-Net.

    ``paper``: everything random, as PyTorch initialises it. ``identity``: the same, but ``merge`` = [identity | 0], so
    that the U-Net with adapters is at first the plain U-Net, and training starts at the base model's loss. ``sum``: the
    paper's rejected way to merge (METHOD.md section 8, ablations): ``merge`` = [identity | identity], never trained, and
    ``to_out`` starts at zero, so that here too training starts at the base model's loss. ``self_attention``: as
    ``identity``, and a run then takes everything else from the base model (``start_from_self_attention``).

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel``.
        init: Start values.
        seed: Seed of the random values; the global random state is left alone.
        layers: Canonical names of the layers to adapt; ``None`` takes METHOD.md's rule.
        timestep: Training index at which references are cached, 0 to 999; 1 in the paper.
        base_model: Name of the base model, for people.
        prediction: What the base model predicts, ``epsilon`` or ``v_prediction``.

    Returns:
        The adapters, float32 on the CPU.

    Raises:
        InputError: ``init`` or ``timestep`` is unknown.
        MismatchError: The U-Net has no layer of that name.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    if init not in get_args(Init):
        raise InputError(f"init must be one of {', '.join(get_args(Init))}; given {init!r}.")
    if not isinstance(timestep, int) or not 0 <= timestep <= 999:
        raise InputError(
            f"The cache's timestep must be a whole number in 0 ... 999; given {timestep!r}."
        )
    info = AdapterInfo(layout_of(unet, layers), timestep, base_model, prediction)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = AdapterSet(info)
    for layer in adapters:
        adapter = adapters[layer]
        assert isinstance(adapter, ReferenceAdapter)
        if init != "paper":
            _initialise_merge(adapter, is_sum=init == "sum")
    return adapters


@torch.no_grad()
def _initialise_merge(adapter: ReferenceAdapter, *, is_sum: bool) -> None:
    """Pass self-attention on as it is; with ``is_sum`` add what is attended to, at first nothing."""
    merge, channels = adapter.merge, adapter.channels
    merge.weight.zero_()
    merge.bias.zero_()
    merge.weight[:, :channels].fill_diagonal_(1)
    if is_sum:
        merge.weight[:, channels:].fill_diagonal_(1)
        merge.requires_grad_(False)
        adapter.to_out.weight.zero_()
        adapter.to_out.bias.zero_()


class LinearGuess:
    """The best linear guess, by least squares, of what a layer's self-attention reads from the map that enters the layer.

    Adapters read the map itself (METHOD.md section 4); self-attention reads it after GroupNorm, ``proj_in`` and LayerNorm.

    Args:
        channels: Width of the layer.
    """

    def __init__(self, channels: int) -> None:
        self.of_maps = torch.zeros(channels, channels, dtype=torch.float64)
        self.of_both = torch.zeros(channels, channels, dtype=torch.float64)
        self._tokens: Tensor | None = None

    def read_map(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take what enters the layer, (batch, channels, height, width)."""
        maps = args[0] if args else kwargs["hidden_states"]
        self._tokens = maps.detach().flatten(2).transpose(1, 2).flatten(0, 1).double().cpu()

    def read_states(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take what enters its self-attention, (batch, tokens, channels)."""
        assert self._tokens is not None
        states = (args[0] if args else kwargs["hidden_states"]).detach().flatten(0, 1)
        self.of_maps += self._tokens.T @ self._tokens
        self.of_both += self._tokens.T @ states.double().cpu()
        self._tokens = None

    def solve(self) -> Tensor:
        """The guess as a matrix, float64 (channels, channels): states are about ``map @ matrix``."""
        strength = RIDGE * self.of_maps.diagonal().mean()
        if strength == 0:
            raise StateError("No reference was looked at: the U-Net was not called.")
        ridge = strength * torch.eye(len(self.of_maps), dtype=torch.float64)
        return torch.linalg.solve(self.of_maps + ridge, self.of_both)


@contextmanager
def observe_self_attention(
    unet: nn.Module, layers: Sequence[str]
) -> Iterator[Mapping[str, LinearGuess]]:
    """Watch whole forward passes of a U-Net over noised references; hooks are gone at exit.

    Yields:
        What is learnt of each layer, by canonical name.
    """
    sites = select_sites(unet, tuple(layers))
    guesses = {name: LinearGuess(site.channels) for name, site in sites.items()}
    hooks: list[Any] = []
    try:
        for name, site in sites.items():
            guess, block = guesses[name], site.block
            hooks.append(site.module.register_forward_pre_hook(guess.read_map, with_kwargs=True))
            hooks.append(block.attn1.register_forward_pre_hook(guess.read_states, with_kwargs=True))
        yield guesses
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def start_from_self_attention(
    unet: nn.Module, adapters: AdapterSet, guesses: Mapping[str, LinearGuess]
) -> None:
    """Give adapters the weights of the self-attention at their layers; ``merge`` stays as it is.

    Queries read what self-attention reads; keys and values read the guess of it, from ``observe_self_attention``.
    """
    for name, site in select_sites(unet, adapters.layers).items():
        adapter: Any = adapters[name]
        block = site.block
        adapter.norm.load_state_dict(block.norm1.state_dict())
        adapter.to_out.load_state_dict(block.attn1.to_out[0].state_dict())
        adapter.to_q.weight.copy_(block.attn1.to_q.weight)
        guess = guesses[name].solve()
        for ours, theirs in ((adapter.to_k, block.attn1.to_k), (adapter.to_v, block.attn1.to_v)):
            ours.weight.copy_(theirs.weight.double().cpu() @ guess.T)
