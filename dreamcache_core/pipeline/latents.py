"""Images to scaled latents and back, with the VAE of a diffusers pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .loading import is_sdxl


class LatentCodec:
    """The VAE of a pipeline, with its scale and its float type.

    Args:
        pipeline: A ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.is_sdxl = is_sdxl(pipeline)

    def encode(self, image: Tensor) -> Tensor:
        """Encode one image; the mode of the VAE's distribution, not a sample of it.

        Args:
            image: (1, height, width, 3) in [0, 1].

        Returns:
            Scaled latent, (1, channels, height / 8, width / 8).
        """
        with self._precise_vae() as vae:
            pixels = image.permute(0, 3, 1, 2).clamp(0, 1) * 2 - 1  # -> (1, 3, height, width)
            device = self.pipeline._execution_device
            encoded = vae.encode(pixels.to(device, vae.dtype))
            # AutoencoderTiny gives latents, not a distribution of them
            latent = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
            shift, factor = self._scale(latent)
            return (latent - shift) * factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents.

        Args:
            latents: Scaled, (images, channels, height, width).

        Returns:
            (images, 3, 8 * height, 8 * width), in [-1, 1] but for overshoot.
        """
        with self._precise_vae() as vae:
            shift, factor = self._scale(latents)
            return vae.decode((latents / factor + shift).to(vae.dtype), return_dict=False)[0]

    def _scale(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Shift and factor with which scaled = (latent - shift) * factor."""
        config = self.pipeline.vae.config
        mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        if not self.is_sdxl or mean is None or std is None:
            return 0.0, config.scaling_factor
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(like) for v in (mean, std))
        return mean, config.scaling_factor / std

    @contextmanager
    def _precise_vae(self) -> Iterator[Any]:
        """Yield the VAE; SDXL's overflows in float16 and is lifted to float32 meanwhile, as in diffusers."""
        vae = self.pipeline.vae
        if not (self.is_sdxl and vae.dtype == torch.float16 and vae.config.force_upcast):
            yield vae
            return
        try:
            yield vae.to(torch.float32)
        finally:
            vae.to(torch.float16)
