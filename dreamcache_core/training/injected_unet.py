"""The module that is trained: its parameters are the adapters, its forward pass is the U-Net with them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..method.adapter import AdapterSet
from ..method.backends import backend_for, layout_of, require_fit
from ..method.blending import ReferenceUse
from ..method.cache import ReferenceCache
from ..method.capture import capture_features
from ..method.injection import inject


class InjectedUNet(nn.Module):
    """A frozen U-Net with trainable adapters.

    The U-Net is held beside the module tree: only the adapters are parameters, so that wrappers for several processes
    synchronise them and nothing else, and checkpoints hold them and nothing else.

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel``; its weights are frozen.
        adapters: The adapters to train.

    Raises:
        MismatchError: The adapters were made for another model.
        UnsupportedModelError: The model is not a supported U-Net.
    """

    def __init__(self, unet: nn.Module, adapters: AdapterSet) -> None:
        super().__init__()
        require_fit(unet, adapters.info.layout, "the adapters")
        self.adapters = adapters
        self._beside = (unet.requires_grad_(False),)
        self._backend = backend_for(unet)
        self._context_width = layout_of(unet).context_width
        self._injection = ExitStack()

    @property
    def unet(self) -> nn.Module:
        """The frozen U-Net."""
        return self._beside[0]

    @contextmanager
    def until_backward(self) -> Iterator[None]:
        """Keep the injection of the forward passes inside the context until its end.

        Activation checkpointing runs blocks again during ``backward``, which must see the same adapters.
        """
        with self._injection:
            yield

    def forward(
        self,
        reference: ReferenceCache,
        noised: Tensor,
        timesteps: Tensor,
        text_states: Tensor,
        unet_kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Predict with one reference per row; call it inside ``until_backward``.

        Args:
            reference: Features of ``batch`` references; reference r serves row r.
            noised: ``x_t`` of the targets, (batch, 4, height, width).
            timesteps: Training index of each row, int64 (batch,).
            text_states: (batch, tokens, context width).
            unet_kwargs: Further arguments of the U-Net.

        Returns:
            The U-Net's prediction, same shape as ``noised``.
        """
        self._injection.close()
        use = ReferenceUse(reference, self.adapters, per_row=True)
        self._injection.enter_context(inject(self.unet, use))
        return self._backend.call(self.unet, noised, timesteps, text_states, **unet_kwargs)

    def call_plain(
        self,
        noised: Tensor,
        timesteps: Tensor,
        text_states: Tensor,
        unet_kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Predict without references; shapes as in ``forward``."""
        self._injection.close()
        return self._backend.call(self.unet, noised, timesteps, text_states, **unet_kwargs)

    @torch.no_grad()
    def capture(
        self,
        noised: Tensor,
        text_states: Tensor,
        unet_kwargs: Mapping[str, Any],
    ) -> ReferenceCache:
        """Cache the references of a batch in one pass that ends at the last cached layer.

        Source: METHOD.md section 3.

        Args:
            noised: ``x_t`` of the references at the adapters' timestep, (batch, 4, height, width).
            text_states: Text states of the empty prompt, (batch, tokens, context width).
            unet_kwargs: Further arguments of the U-Net.

        Returns:
            Features on the device of ``noised``.
        """
        timestep = self.adapters.info.timestep
        timesteps = torch.full((len(noised),), timestep, device=noised.device)
        with capture_features(self.unet, self.adapters.layers, stop_early=True) as features:
            self.call_plain(noised, timesteps, text_states, unet_kwargs)
        height, width = noised.shape[-2:]
        return ReferenceCache(features, self._context_width, (height, width), timestep)
