"""How much memory the forward pass keeps for the backward pass: counted, or foretold without computing anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..method.adapter import AdapterSet
from ..pipeline.latents import LATENT_FACTOR
from .injected_unet import InjectedUNet

TEXT_TOKENS = 77


class SavedBytes:
    """Counts the bytes that autograd keeps, each storage once.

    Args:
        excluded: Tensors that exist anyway, such as weights.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self._excluded = {_storage(tensor) for tensor in excluded}
        self._sizes: dict[int, int] = {}
        self._kept: list[Tensor] = []  # an address is not given out again while its tensor lives

    @property
    def total(self) -> int:
        """Bytes kept so far."""
        return sum(self._sizes.values())

    def counting(self) -> Any:
        """Return a context; forward passes inside it are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._excluded and storage not in self._sizes:
            self._sizes[storage] = tensor.untyped_storage().nbytes()
            self._kept.append(tensor)
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def estimate_saved_bytes(
    module: InjectedUNet,
    *,
    batch_size: int,
    target_px: tuple[int, int],
    reference_px: int,
    dtype: torch.dtype,
    is_checkpointed: bool,
) -> int:
    """Foretell what one training step keeps, by running it on tensors without contents.

    Args:
        module: The U-Net (diffusers') with its adapters.
        batch_size: Rows of the step.
        target_px: Height and width of the targets.
        reference_px: Side of the references.
        dtype: Float type that the U-Net computes in.
        is_checkpointed: Whether activations are computed again in the backward pass.

    Returns:
        Bytes, without weights, gradients and temporary buffers.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    real: Any = module.unet
    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with _default_dtype(dtype):  # fake weights cannot be converted
            unet = type(real).from_config(real.config)
        if is_checkpointed:
            unet.enable_gradient_checkpointing()
        fake = InjectedUNet(unet, AdapterSet(module.adapters.info))
        text = torch.empty(batch_size, TEXT_TOKENS, real.config.cross_attention_dim, dtype=dtype)
        conditions = _added_conditions(real.config, batch_size, dtype)
        reference, target = (
            torch.empty(
                batch_size,
                real.config.in_channels,
                height // LATENT_FACTOR,
                width // LATENT_FACTOR,
                dtype=dtype,
            )
            for height, width in ((reference_px, reference_px), target_px)
        )
        cache = fake.capture(reference, text, conditions)
        saved = SavedBytes([*unet.parameters(), *fake.parameters()])
        timesteps = torch.empty(batch_size, dtype=torch.int64)
        with fake.until_backward(), saved.counting():
            fake(cache, target, timesteps, text, conditions)
        return saved.total


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _added_conditions(config: Any, batch_size: int, dtype: torch.dtype) -> dict[str, Any]:
    if config.addition_embed_type is None:
        return {}
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pooled = torch.empty(batch_size, width, dtype=dtype)
    ids = torch.empty(batch_size, 6, dtype=dtype)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
