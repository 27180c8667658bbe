"""Where new images look in a reference: the adapters' attention, made visible (the paper's Figure 5)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InputError, StateError
from ..images.reference import check_image, check_mask
from .backends import select_sites
from .blending import LayerReference, pool_area
from .cache import ReferenceCache
from .compiling import plain_module, temporary_hooks
from .layers import AttentionSite
from .tokens import keep_tokens, num_kept, spread_shares

QUERIES_AT_A_TIME = 256
UNSEEN, OUTSIDE = 0.25, 0.4
"""Brightness of what is not looked at, and of what lies outside the region that is asked about."""

FULLY_LIT = 0.98
"""Quantile of the places at which brightness ends: a few places draw most of the attention and would darken the rest."""


@dataclass(frozen=True, eq=False)
class LayerStates:
    """What enters an adapted block in one call of the U-Net.

    Attributes:
        hidden_states: (batch, tokens, channels).
        size: Height and width of the layer's feature map; their product is the number of tokens.
        heads: Heads of the block's self-attention, which its adapter shares.
    """

    hidden_states: Tensor
    size: tuple[int, int]
    heads: int


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Where images look in a reference, averaged over heads, in the layers of the finest feature map.

    Coarser layers are left out: they place things, and would blur what the finest ones point at.

    Attributes:
        looked_at: How much each place of the reference images is looked at, 1 where all places are alike;
            (images, references, height, width), float32.
        seen: The reference's colour at the place that each place of a new image looks at most,
            (images, rows of tokens, columns of tokens, 3), float32 in [0, 1].
    """

    looked_at: Tensor
    seen: Tensor


@contextmanager
def record_hidden_states(
    unet: nn.Module, layers: Sequence[str]
) -> Iterator[dict[str, LayerStates]]:
    """Read the hidden states that enter the adapted blocks, of the last call made inside the context.

    Hooks are gone at exit, whatever happens.

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel``, with or without adapters injected.
        layers: Canonical names.

    Yields:
        States by canonical layer name, filled while the U-Net runs.

    Raises:
        MismatchError: The U-Net has no layer of that name.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    states: dict[str, LayerStates] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def read_size(site: AttentionSite, feature: Tensor) -> None:
        sizes[site.name] = (feature.shape[-2], feature.shape[-1])

    def read_states(site: AttentionSite, _: nn.Module, args: tuple[Any, ...]) -> None:
        states[site.name] = LayerStates(args[0].detach(), sizes[site.name], site.heads)

    hooks: list[RemovableHandle] = []
    for site in select_sites(plain_module(unet), layers).values():
        norm: nn.Module = site.block.norm1
        hooks.append(site.hook_input(partial(read_size, site)))
        hooks.append(norm.register_forward_pre_hook(partial(read_states, site)))
    with temporary_hooks(unet, hooks):
        yield states


@torch.no_grad()
def attention_maps(
    states: Mapping[str, LayerStates],
    references: Mapping[str, LayerReference],
    cache: ReferenceCache,
    images: Tensor,
    region: Tensor | None = None,
) -> AttentionMaps:
    """Compute where images look in a reference.

    Source: METHOD.md section 4, the softmax of ``attn_mem``.

    Args:
        states: From ``record_hidden_states``; every batch row is an image.
        references: From ``prepare_layer``, by canonical layer name: one use's keys at each layer.
        cache: The reference of that use.
        images: The images it was encoded from, (references, height, width, 3) in [0, 1].
        region: Places of the new images that are asked about, (height, width) or (1 or images, height, width) in
            [0, 1], any size; ``None``: all.

    Returns:
        The maps, on the CPU.

    Raises:
        InputError: The images are not those of the reference, or the region is empty or misshapen.
        StateError: The U-Net did not run inside ``record_hidden_states``.
    """
    _check_images(images, cache)
    looked_at: list[Tensor] = []
    seen: list[Tensor] = []
    for layer in _finest_layers(states, references):
        size = cache.features[layer].shape[-2:]
        colours = pool_area(images.movedim(-1, 1).cpu(), (size[0], size[1]))
        colours = colours.movedim(1, -1).flatten(0, 2)  # -> (reference_tokens, 3)
        weights = _weights(region, states[layer])
        kept, spread = _kept_colours(colours, cache, layer)
        shares, colours_seen = _read(states[layer], references[layer], kept, weights)
        maps = (spread(shares) * len(colours)).unflatten(1, (cache.num_references, *size))
        looked_at.append(_resize(maps, (images.shape[1], images.shape[2])))
        seen.append(colours_seen.unflatten(1, states[layer].size))
    return AttentionMaps(torch.stack(looked_at).mean(dim=0), torch.stack(seen).mean(dim=0))


def _kept_colours(
    colours: Tensor, cache: ReferenceCache, layer: str
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Colours of the tokens that are attended to, and what brings their shares back to all places of the images."""
    if cache.masks is None:
        return colours, lambda shares: shares
    subjects = cache.masks[layer].flatten(1).cpu().unbind()
    rows = zip(colours.split(len(subjects[0])), subjects, strict=True)
    counts = [num_kept(subject) for subject in subjects]

    def spread(shares: Tensor) -> Tensor:
        parts = zip(shares.split(counts, dim=-1), subjects, strict=True)
        return torch.cat([spread_shares(*part) for part in parts], dim=-1)

    return torch.cat([keep_tokens(*row) for row in rows]), spread


def _finest_layers(states: Mapping[str, LayerStates], layers: Iterable[str]) -> list[str]:
    if missing := [layer for layer in layers if layer not in states]:
        raise StateError(
            f"No hidden states of {', '.join(missing)} were read: the U-Net was not called inside record_hidden_states."
        )
    tokens = {layer: states[layer].hidden_states.shape[1] for layer in layers}
    return [layer for layer, count in tokens.items() if count == max(tokens.values())]


def draw_attention(maps: AttentionMaps, images: Tensor, region: Tensor | None = None) -> Tensor:
    """Draw maps side by side: the reference images, lit where they are looked at, then what the image sees in them.

    Args:
        maps: From ``attention_maps``.
        images: The reference's images, (references, height, width, 3) in [0, 1].
        region: As ``attention_maps`` took it; what lies outside is darkened.

    Returns:
        (images, height, total width, 3), float32 in [0, 1].
    """
    height = images.shape[1]
    flat = maps.looked_at.flatten(1)
    full = flat.kthvalue(math.ceil(FULLY_LIT * flat.shape[1]), dim=1).values
    relative = maps.looked_at / full.clamp(min=1e-6)[:, None, None, None]
    light = UNSEEN + (1 - UNSEEN) * relative.clamp(max=1)
    lit = images.cpu().float() * light[..., None]  # -> (images, references, height, width, 3)
    old_height, old_width = maps.seen.shape[1:3]
    size = (height, max(1, round(height * old_width / old_height)))
    seen = _resize(maps.seen.movedim(-1, 1), size)
    if region is not None:
        seen = seen * (OUTSIDE + (1 - OUTSIDE) * _resize(check_mask(region).cpu()[:, None], size))
    panels = [*lit.unbind(dim=1), seen.movedim(1, -1)]
    return torch.cat(panels, dim=2).clamp(0, 1)


def _check_images(images: Tensor, cache: ReferenceCache) -> None:
    check_image(images)
    height, width = cache.latent_size
    if len(images) != cache.num_references or (
        abs(images.shape[1] / images.shape[2] - height / width) > 0.02 * height / width
    ):
        raise InputError(
            f"Expected the {cache.num_references} images that the reference was encoded from, of aspect {width} : "
            f"{height}; given {len(images)} of {images.shape[2]} x {images.shape[1]} pixels. Connect the image that "
            "went into Encode Reference."
        )


def _weights(region: Tensor | None, states: LayerStates) -> Tensor:
    """Weight of each token of the new images, (1 or images, tokens), summing to 1."""
    count = states.hidden_states.shape[1]
    if states.size[0] * states.size[1] != count:
        raise StateError(
            f"The model has {count} tokens where its feature map is {states.size[0]} x {states.size[1]}: another "
            "node merges or adds some (token merging, say), so their places are unknown. Leave it out for this image."
        )
    if region is None:
        return torch.full((1, count), 1 / count)
    weights = pool_area(check_mask(region).cpu(), states.size).flatten(1)
    totals = weights.sum(dim=1, keepdim=True)
    if not bool((totals > 0).all()):
        raise InputError("The mask is empty: it must mark places with 1. Paint it or leave it out.")
    return weights / totals


def _read(
    states: LayerStates, reference: LayerReference, colours: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of one layer, its mean over the heads.

    Args:
        states: Of the layer.
        reference: At the layer.
        colours: Of the reference's tokens, (reference_tokens, 3).
        weights: Of the images' tokens, (1 or images, tokens).

    Returns:
        Share of the attention that each token of the reference gets, (images, reference_tokens), and the colour of the
        one that each token of the images looks at most, (images, tokens, 3).
    """
    adapter, hidden_states = reference.adapter, states.hidden_states.to(reference.dtype)
    query, key = (
        t.float().unflatten(-1, (states.heads, -1)).transpose(1, 2)
        for t in (adapter.to_q(adapter.norm(hidden_states)), reference.key)
    )  # -> (images or 1, heads, tokens, head_dim)
    weights = weights.to(query.device).expand(len(query), -1)
    colours = colours.to(query.device)
    shares = torch.zeros(len(query), key.shape[2], device=query.device)
    seen: list[Tensor] = []
    chunks = zip(
        query.split(QUERIES_AT_A_TIME, dim=2), weights.split(QUERIES_AT_A_TIME, dim=1), strict=True
    )
    for part, part_weights in chunks:
        logits = part @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        attention = logits.softmax(dim=-1).mean(dim=1)  # -> (images, part, reference_tokens)
        shares += torch.einsum("iq,iqr->ir", part_weights, attention)
        seen.append(colours[attention.argmax(dim=-1)])
    return shares.cpu(), torch.cat(seen, dim=1).cpu()


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)
