"""The frozen base model of training: images to latents, captions to text states, and which model it is."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loading import load_diffusers_pipeline, quiet_loading
from .pipeline import DreamCachePipeline
from .sampling import Text

MAX_CHECKED_CAPTIONS = 10_000

logger = logging.getLogger(__name__)


class BaseModel:
    """A diffusers pipeline as training uses it; nothing of it learns.

    Args:
        path: diffusers folder or single-file checkpoint.
        config: For a single file: a diffusers folder of the same family.
        dtype: Float type of the weights.

    Raises:
        DreamCacheError: The files are missing, damaged or of another kind of model.
    """

    def __init__(self, path: str, config: str | None, dtype: torch.dtype) -> None:
        self.path = Path(path)
        self.pipeline = DreamCachePipeline(
            load_diffusers_pipeline(path, config=config, dtype=dtype)
        )
        for part in self.parts:
            part.requires_grad_(False).eval()

    @property
    def unet(self) -> Any:
        """The U-Net."""
        return self.pipeline.pipeline.unet

    @property
    def name(self) -> str:
        """Name of the file or folder."""
        return self.path.resolve().name

    @property
    def parts(self) -> list[torch.nn.Module]:
        """U-Net, VAE and text encoders."""
        components: dict[str, Any] = self.pipeline.pipeline.components
        return [part for part in components.values() if isinstance(part, torch.nn.Module)]

    @property
    def scheduler(self) -> Any:
        """Diffusers' scheduler: noise levels and what the model predicts."""
        return self.pipeline.pipeline.scheduler

    def to(self, device: torch.device) -> None:
        """Move all parts."""
        self.pipeline.pipeline.to(device)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images with the VAE: the mode of its distribution.

        Args:
            images: (batch, height, width, 3) in [0, 1].

        Returns:
            Scaled latents, (batch, channels, height / 8, width / 8).
        """
        return self.pipeline.codec.encode(images)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        """Encode captions; text beyond the encoder's limit is cut off."""
        with quiet_loading():  # diffusers names each caption that is too long, each time
            return self.pipeline.encode_text(list(captions))

    def unet_kwargs(self, text: Text, height_px: int, width_px: int) -> dict[str, Any]:
        """Further arguments of the U-Net: for SDXL pooled text and time ids."""
        return text.conditions(height_px, width_px)

    def warn_about_long_captions(self, captions: Sequence[str]) -> None:
        """Say how many captions exceed the text encoder's limit; ``MAX_CHECKED_CAPTIONS`` are enough to tell."""
        tokenizer = self.pipeline.pipeline.tokenizer
        ids = tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
        too_long = [
            caption
            for caption, tokens in zip(captions, ids, strict=True)
            if len(tokens) > tokenizer.model_max_length
        ]
        if too_long:
            logger.warning(
                "%d of %s%d captions are longer than the text encoder takes (%r ...); what is beyond is cut off.",
                len(too_long),
                "the first " if len(captions) == MAX_CHECKED_CAPTIONS else "",
                len(captions),
                too_long[0][:60],
            )
