"""Read features out of a U-Net: one pass over the reference becomes a ``ReferenceCache``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, StateError
from .backends import backend_for, layout_of, select_sites
from .cache import ReferenceCache
from .compiling import plain_module, temporary_hooks
from .tokens import subject_tokens


class _ForwardEnded(BaseException):
    """The last cached layer was reached; not an error, so ``except Exception`` must not catch it."""


@contextmanager
def capture_features(
    unet: nn.Module, layers: Sequence[str] | None = None, *, stop_early: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Read the feature maps that enter the cached layers, of the calls made inside the context.

    Source: METHOD.md section 3, point 4: before the attention module's GroupNorm and ``proj_in``. Hooks are gone at
    exit, whatever happens.

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel``. A compiled one runs uncompiled inside
            the context, as compiled code would ignore the hooks.
        layers: Canonical names; ``None`` takes METHOD.md's rule.
        stop_early: End the forward pass at the last cached layer. The call then does not return: the context is left
            at that point, and the statements after the call inside it are skipped. What stands between context and call
            sees a ``BaseException`` pass: enter the context in the thread of the call, and close to it.

    Yields:
        Features by canonical layer name, (batch, channels, height, width), filled while the U-Net runs; those of
        several calls are concatenated along the batch.

    Raises:
        MismatchError: The U-Net has no layer of that name.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    sites = select_sites(plain_module(unet), layers)
    features: dict[str, Tensor] = {}
    ended, last = _ForwardEnded(), list(sites)[-1]

    def read(layer: str, feature: Tensor) -> None:
        feature = feature.detach().clone()
        features[layer] = torch.cat([features[layer], feature]) if layer in features else feature
        if stop_early and layer == last:
            raise ended

    hooks = [site.hook_input(partial(read, layer)) for layer, site in sites.items()]
    try:
        with temporary_hooks(unet, hooks):
            yield features
    except _ForwardEnded as signal:
        if signal is not ended:  # that of a capture around this one
            raise
        # it leads to this frame, which holds it: everything in the frames between would wait for the collector
        signal.__traceback__ = None


@torch.no_grad()
def capture_reference(
    unet: nn.Module,
    noised_latent: Tensor,
    timestep: int,
    text_states: Tensor,
    *,
    unet_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    layers: Sequence[str] | None = None,
    mask: Tensor | None = None,
) -> ReferenceCache:
    """Cache one or several reference images, each by its own forward pass.

    Source: METHOD.md section 3. One at a time, so that an image's features do not depend on what is cached with it.

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel`` without adapters.
        noised_latent: ``x_t`` of the references, (references, 4, height, width).
        timestep: Training index t of the pass, 0 to 999; 1 in the paper.
        text_states: Text states of the empty prompt, (1 or references, tokens, context width).
        unet_kwargs: Further arguments of the U-Net (``added_cond_kwargs`` on diffusers, ``y`` on ldm). Tensors whose
            first axis counts the references are split with them.
        seed: Seed that the noise was drawn from, recorded in the cache.
        layers: Canonical names of the layers to cache, those of the adapters; ``None`` takes METHOD.md's rule.
        mask: The subject in the reference images, (1 or references, height, width) in [0, 1]; ``None``: all of them.

    Returns:
        The cache, on the CPU.

    Raises:
        InputError: ``noised_latent`` is not of four axes, or the text states do not fit it or the U-Net.
        MismatchError: The U-Net has no layer of that name.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    if noised_latent.ndim != 4:
        raise InputError(
            f"Expected a latent of (references, 4, height, width), given {tuple(noised_latent.shape)}."
        )
    backend, count = backend_for(unet), noised_latent.shape[0]
    width = layout_of(unet).context_width
    if text_states.ndim != 3 or len(text_states) not in (1, count) or text_states.shape[2] != width:
        raise InputError(
            f"Expected text states of (1 or {count}, tokens, {width}), given {tuple(text_states.shape)}. Encode the "
            "empty prompt with this model's own text encoder."
        )
    passes: list[dict[str, Tensor]] = []
    for i in range(count):
        row_kwargs = {k: _row(v, i, count) for k, v in (unet_kwargs or {}).items()}
        steps = torch.tensor([timestep], device=noised_latent.device)
        with capture_features(unet, layers, stop_early=True) as features:
            text = _row(text_states, i, count)
            backend.call(unet, noised_latent[i : i + 1], steps, text, **row_kwargs)
        passes.append(features)
    return cache_from_features(passes, width, noised_latent.shape[-2:], timestep, seed, mask)


def cache_from_features(
    passes: Sequence[Mapping[str, Tensor]],
    context_width: int,
    latent_size: Sequence[int],
    timestep: int,
    seed: int | None,
    mask: Tensor | None = None,
) -> ReferenceCache:
    """Build a cache from what ``capture_features`` read.

    Args:
        passes: Features of each pass over the references, in order.
        context_width: Channels of the U-Net's text states.
        latent_size: Height and width of the latents.
        timestep: Training index of the passes.
        seed: Seed of the noise, or ``None``.
        mask: The subject in the reference images, (1 or references, height, width) in [0, 1], or ``None``.

    Returns:
        The cache, on the CPU.

    Raises:
        InputError: A feature is NaN or infinite, or a mask is empty.
        StateError: The U-Net did not run inside ``capture_features``.
    """
    if not passes or not all(passes):
        raise StateError("No features were read: the U-Net was not called inside capture_features.")
    features = {name: torch.cat([p[name] for p in passes]).cpu() for name in passes[0]}
    if not all(bool(feature.isfinite().all()) for feature in features.values()):
        raise InputError(
            "The features of the reference hold NaN or infinity: the image does, or half precision overflowed. Check "
            "the image and the VAE, or load the model in another precision."
        )
    height, width = latent_size
    masks = None
    if mask is not None:
        mask = mask.expand(len(next(iter(features.values()))), -1, -1)
        masks = {n: subject_tokens(mask, *f.shape[-2:]) for n, f in features.items()}
    return ReferenceCache(features, context_width, (height, width), timestep, seed, masks)


def _row(value: Any, index: int, count: int) -> Any:
    if isinstance(value, Mapping):
        return {k: _row(v, index, count) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Tensor) and count > 1 and value.ndim > 0 and value.shape[0] == count:
        return value[index : index + 1]
    return value
