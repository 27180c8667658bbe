"""The module that is trained, whose parameters are the adapters and whose forward pass is the U-Net with them; its loss.

Source: METHOD.md sections 3 and 7.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..fitting.noise_schedule import NoiseSchedule
from ..method.adapter import AdapterSet
from ..method.backends import backend_for, layout_of, require_fit
from ..method.blending import ReferenceUse
from ..method.cache import LATENT_FACTOR, ReferenceCache
from ..method.capture import capture_features
from ..method.injection import inject
from ..pipeline.base_model import BaseModel
from ..pipeline.sampling import Text
from .config import TrainConfig
from .objective import denoising_loss


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
        require_fit(unet, adapters.info.layout, "the adapters are for")
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
        with capture_features(self.unet, self.adapters.layers, stop_early=True) as features:
            self.call_plain(noised, self.reference_timesteps(noised), text_states, unet_kwargs)
        height, width = noised.shape[-2:]
        timestep = self.adapters.info.timestep
        return ReferenceCache(features, self._context_width, (height, width), timestep)

    def reference_timesteps(self, references: Tensor) -> Tensor:
        """Return the adapters' timestep for each reference, int64 (references,)."""
        timestep = self.adapters.info.timestep
        return torch.full((len(references),), timestep, device=references.device)


class Objective:
    """The loss of a run's batches; what is not precomputed is encoded here.

    Args:
        base: The base model, on its device.
        module: Its U-Net with the adapters.
        schedule: Its noise levels.
        config: Settings of the run.
        reference_px: Side of the references, pixels.
    """

    def __init__(
        self,
        base: BaseModel,
        module: InjectedUNet,
        schedule: NoiseSchedule,
        config: TrainConfig,
        reference_px: int,
    ) -> None:
        self.base, self.module, self.schedule = base, module, schedule
        self.config, self.reference_px = config, reference_px
        self.empty = base.encode_text([""])

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Noise the targets, predict with their references cached, and compare.

        Args:
            model: The module as accelerate prepared it; call it inside ``until_backward``.
            batch: From ``TrainingData.loader``, on the device.
        """
        latent, noise, timesteps = self._target_latent(batch), batch["noise"], batch["timestep"]
        text = self._text(batch)
        seen = text if self.config.reference_caption else self.empty.repeat_each(len(latent))
        reference = self.module.capture(*self._reference_inputs(batch, seen))
        height, width = (side * LATENT_FACTOR for side in latent.shape[2:])
        prediction = model(
            reference,
            self.schedule.add_noise(latent, noise, timesteps).to(self.base.pipeline.dtype),
            timesteps,
            text.states,
            self.base.unet_kwargs(text, height, width),
        )
        return denoising_loss(
            prediction,
            self.schedule.target(latent, noise, timesteps),
            self.schedule.weights(timesteps, self.config.min_snr_gamma),
        )

    def _reference_inputs(
        self, batch: Mapping[str, Any], text: Text
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Noise the references -> arguments of ``InjectedUNet.capture``."""
        if "reference_latent" in batch:
            latent = batch["reference_latent"].float()
        else:
            latent = self.base.encode_images(batch["reference"]).float()
        timesteps = self.module.reference_timesteps(latent)
        noised = self.schedule.add_noise(latent, batch["reference_noise"], timesteps)
        return (
            noised.to(self.base.pipeline.dtype),
            text.states,
            self.base.unet_kwargs(text, self.reference_px, self.reference_px),
        )

    def _target_latent(self, batch: Mapping[str, Any]) -> Tensor:
        if "target_latent" in batch:
            return batch["target_latent"].float()
        return self.base.encode_images(batch["target"]).float()

    def _text(self, batch: Mapping[str, Any]) -> Text:
        """Text states of the captions, those of the empty prompt where the caption is dropped."""
        is_dropped = batch["is_dropped"]
        if "text_states" not in batch:
            pairs = zip(batch["caption"], is_dropped.tolist(), strict=True)
            return self.base.encode_text(["" if drop else caption for caption, drop in pairs])
        like = self.empty.states
        states = torch.where(is_dropped[:, None, None], like, batch["text_states"].to(like.dtype))
        if self.empty.pooled is None:
            return Text(states, None)
        given = batch["text_pooled"].to(like.dtype)
        return Text(states, torch.where(is_dropped[:, None], self.empty.pooled, given))
