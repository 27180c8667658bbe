"""A base model's self-attention as an adapter: what it reads in its own image, read from a reference instead."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError, UnsupportedModelError
from ..method.adapter import AdapterSet
from ..method.backends import select_sites
from ..method.compiling import plain_module, temporary_hooks

RIDGE = 1e-3
"""Added to the diagonal, in shares of its mean, for channels that hardly vary."""


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
        self._like = torch.zeros(1, channels)

    def read_map(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take what enters the layer, (batch, channels, height, width)."""
        maps = args[0] if args else kwargs["hidden_states"]
        self._tokens = maps.detach().flatten(2).transpose(1, 2).flatten(0, 1).double().cpu()

    def read_states(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take what enters its self-attention, (batch, tokens, channels)."""
        assert self._tokens is not None
        states = (args[0] if args else kwargs["hidden_states"]).detach().flatten(0, 1)
        self._like = states[:1]
        self.of_maps += self._tokens.T @ self._tokens
        self.of_both += self._tokens.T @ states.double().cpu()
        self._tokens = None

    def solve(self) -> Tensor:
        """The guess as a matrix, float64 (channels, channels): states are about ``map @ matrix``."""
        strength = RIDGE * self.of_maps.diagonal().mean()
        if strength == 0:
            raise StateError("No reference was looked at: the U-Net was not called.")
        if not bool(self.of_both.isfinite().all()):
            raise StateError(
                "What the U-Net computes holds NaN or infinity: half precision overflowed. Load the model in another precision."
            )
        ridge = strength * torch.eye(len(self.of_maps), dtype=torch.float64)
        return torch.linalg.solve(self.of_maps + ridge, self.of_both)

    def identity(self) -> Tensor:
        """The identity matrix, where and in the float type in which the layer computes."""
        return torch.eye(len(self.of_maps)).to(self._like)


@contextmanager
def observe_self_attention(
    unet: nn.Module, layers: Sequence[str]
) -> Iterator[Mapping[str, LinearGuess]]:
    """Watch whole forward passes of a U-Net over noised references; hooks are gone at exit.

    Yields:
        What is learnt of each layer, by canonical name.
    """
    sites = select_sites(plain_module(unet), tuple(layers))
    guesses = {name: LinearGuess(site.channels) for name, site in sites.items()}
    hooks = [
        module.register_forward_pre_hook(read, with_kwargs=True)
        for name, site in sites.items()
        for module, read in (
            (site.module, guesses[name].read_map),
            (site.block.attn1, guesses[name].read_states),
        )
    ]
    with temporary_hooks(unet, hooks):
        yield guesses


@torch.no_grad()
def start_from_self_attention(
    unet: nn.Module, adapters: AdapterSet, guesses: Mapping[str, LinearGuess]
) -> None:
    """Give adapters the weights of the self-attention at their layers; ``merge`` stays as it is.

    Queries read what self-attention reads; keys and values read the guess of it, from ``observe_self_attention``. Weights
    are read off by calling the layers, so that LoRAs, quantised and offloaded weights count as they compute.

    Raises:
        StateError: No reference was looked at, or what was seen holds NaN or infinity.
        UnsupportedModelError: Another package has replaced the self-attention.
    """
    for name, site in select_sites(plain_module(unet), adapters.layers).items():
        adapter, attn1, guess = adapters[name], site.block.attn1, guesses[name]
        if not all(hasattr(attn1, part) for part in ("to_q", "to_k", "to_v", "to_out")):
            raise UnsupportedModelError(
                f"The self-attention of layer {name} is a {type(attn1).__name__}, which another package has put in place of the "
                "model's own: there is nothing to read adapters from. Load the model without it."
            )
        matrix = guess.solve().T
        query, key, value, out = (
            _matrix(layer, guess) for layer in (attn1.to_q, attn1.to_k, attn1.to_v, attn1.to_out[0])
        )
        weights = {
            "norm.weight": site.block.norm1.weight,
            "norm.bias": site.block.norm1.bias,
            "to_q.weight": query,
            "to_k.weight": key @ matrix,
            "to_v.weight": value @ matrix,
            "to_out.weight": out,
            "to_out.bias": attn1.to_out[0](0 * guess.identity()[:1])[0],
        }
        adapter.load_state_dict(weights, strict=False)


def _matrix(layer: nn.Module, guess: LinearGuess) -> Tensor:
    """What a linear layer multiplies by, float64 (out, in)."""
    identity = guess.identity()
    return (layer(identity) - layer(0 * identity)).T.double().cpu()
