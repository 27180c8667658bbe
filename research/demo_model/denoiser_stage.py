"""Training of the demo's U-Net and text encoder together, on latents, to predict v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamcache_core.fitting.noise_schedule import NUM_TIMESTEPS, NoiseSchedule


class DenoiserStage:
    """Teaches a U-Net and a text encoder what captions mean.

    Args:
        text_encoder: Learns along.
        unet: Learns to predict v.
        schedule: Noise levels, v prediction.
        latents: Scaled latents of all images, (count, 4, height, width).
        weights: Weight of each place's error, (count, height, width).
        tokens: Token ids of all captions, (count, wordings, tokens).
        no_tokens: Token ids of the empty caption, (tokens,).
        batch: Images in a step.
        drop_caption: Share of images whose caption is empty.
        device: Where it learns.
    """

    name = "unet"

    def __init__(
        self,
        text_encoder: Any,
        unet: Any,
        schedule: NoiseSchedule,
        latents: Tensor,
        weights: Tensor,
        tokens: Tensor,
        no_tokens: Tensor,
        *,
        batch: int,
        drop_caption: float,
        device: torch.device,
    ) -> None:
        self.module: nn.Module = _Denoiser(text_encoder, unet)
        self.schedule, self.latents, self.weights = schedule, latents, weights
        self.tokens, self.no_tokens = tokens, no_tokens
        self.batch, self.drop_caption, self.device = batch, drop_caption, device

    def loss(self, module: nn.Module, random: np.random.Generator) -> Tensor:
        """Weighted mean of the squared error of the predicted v, at timesteps spread evenly over the batch."""
        chosen = torch.from_numpy(random.integers(len(self.latents), size=self.batch))
        wording = torch.from_numpy(random.integers(self.tokens.shape[1], size=self.batch))
        tokens = self.tokens[chosen, wording]
        tokens[torch.from_numpy(random.random(self.batch) < self.drop_caption)] = self.no_tokens
        strata = (np.arange(self.batch) + random.random(self.batch)) / self.batch
        timesteps = torch.from_numpy((strata * NUM_TIMESTEPS).astype(np.int64)).to(self.device)
        latents = self.latents[chosen].float().to(self.device)
        noise = torch.from_numpy(random.standard_normal(latents.shape, dtype=np.float32)).to(
            self.device
        )
        prediction = module(
            self.schedule.add_noise(latents, noise, timesteps), timesteps, tokens.to(self.device)
        )
        target = self.schedule.target(latents, noise, timesteps)
        errors = (prediction.float() - target).square().mean(dim=1)
        weights = self.weights[chosen].to(errors)
        return (weights * errors).sum() / weights.sum()


class _Denoiser(nn.Module):
    """Both models in one forward."""

    def __init__(self, text_encoder: Any, unet: Any) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample


def tokenise(tokenizer: Any, captions: Sequence[Sequence[str]]) -> Tensor:
    """Turn captions, the same number for each image, into token ids (images, wordings, tokens)."""
    texts = [text for wordings in captions for text in wordings]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.reshape(len(captions), -1, ids.shape[-1])
