"""Training of the demo's autoencoder: images in, images out, colours and edges kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .architecture import SCALING_FACTOR
from .image_pool import PATCH, ImagePool

KL_WEIGHT = 2e-3
GUIDED_SPREAD = 2.0
COARSE = 4
RECOLOURED = 0.5
SUBJECT_WEIGHT = 4.0
"""Weight of errors where the subject is; backgrounds, of which there are few, have 1."""

ENCODE_BATCH = 16
DECODER_NOISE = 0.1
"""Most noise, in standard deviations of the latents, that the decoder alone is trained with."""


class AutoencoderStage:
    """Teaches an ``AutoencoderKL`` to repeat crops of images.

    Args:
        module: A ``RepeatingAutoencoder``; it learns.
        pool: The images.
        batch: Crops in a step.
        crop: Side of the crops in pixels; all of them show something of the subject.
        colour_weight: Weight of what pulls three latent channels towards the mean colours. Without it the first
            thousands of steps find shades of grey only; with it for long, one channel is left for everything else.
        device: Where it learns.
    """

    name = "autoencoder"

    def __init__(
        self,
        module: nn.Module,
        pool: ImagePool,
        *,
        batch: int,
        crop: int,
        colour_weight: float,
        device: torch.device,
    ) -> None:
        self.pool, self.batch, self.crop, self.device = pool, batch, crop, device
        self.colour_weight = colour_weight
        self.module = module

    def loss(self, module: nn.Module, random: np.random.Generator) -> Tensor:
        """Compare crops with what comes out: L1 of pixels, of coarse pixels, of edges; a little KL."""
        crops, subjects = zip(
            *(
                self._crop(int(index), random)
                for index in random.integers(len(self.pool), size=self.batch)
            ),
            strict=True,
        )
        images = to_tensor(np.stack(crops)).to(self.device)
        weights = 1.0 + (SUBJECT_WEIGHT - 1.0) * torch.from_numpy(np.stack(subjects))[:, None]
        weights = (weights / weights.mean()).to(images)
        repeated, colours, divergence = module(images, int(random.integers(2**31)))
        wrong = repeated - images
        coarse = (functional.avg_pool2d(wrong, COARSE) * weights[..., ::COARSE, ::COARSE]).abs()
        edges = sum(
            (wrong.diff(dim=side) * weights.narrow(side, 1, self.crop - 1)).abs().mean()
            for side in (2, 3)
        )
        means = GUIDED_SPREAD * functional.avg_pool2d(images, PATCH)
        return (
            (wrong * weights).abs().mean()
            + coarse.mean()
            + edges
            + self.colour_weight * functional.l1_loss(colours, means)
            + KL_WEIGHT * divergence
        )

    def _crop(self, index: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Cut a crop whose middle lies on the subject, or as near to it as the image's border lets it.

        Returns:
            The crop, and whether each of its pixels is in a patch that the subject reaches.
        """
        subject = self.pool.subjects[index]
        patches = np.argwhere(subject)
        middle = PATCH * (patches[random.integers(len(patches))] + random.random(2))
        highest = self.pool.images.shape[1] - self.crop
        top, left = np.clip(middle - self.crop / 2, 0, highest).astype(int)
        window = np.s_[top : top + self.crop, left : left + self.crop]
        pixels = subject.repeat(PATCH, axis=0).repeat(PATCH, axis=1)[window]
        return _recolour(self.pool.images[index][window], random), pixels


def _recolour(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Exchange and invert colour channels of most images, so that no background's colours are learnt by heart."""
    if random.random() >= RECOLOURED:
        return image
    flip = random.integers(2, size=3, dtype=np.uint8) * np.uint8(255)
    return image[..., random.permutation(3)] ^ flip


class RepeatingAutoencoder(nn.Module):
    """Encode, sample, decode: what the loss looks at, in one forward.

    Args:
        autoencoder: An ``AutoencoderKL``.
        decoder_alone: Whether the encoder is frozen, so that latents stay what they are; then the decoder learns from
            latents with some noise, as a U-Net's are never exact.
    """

    def __init__(self, autoencoder: Any, *, decoder_alone: bool = False) -> None:
        super().__init__()
        self.autoencoder, self.decoder_alone = autoencoder, decoder_alone
        for part in (autoencoder.encoder, autoencoder.quant_conv):
            part.requires_grad_(not decoder_alone)

    def forward(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Repeat images.

        Args:
            images: RGB in -1..1, (count, 3, height, width).
            seed: Of the sample.

        Returns:
            The repeated images; the means of three latent channels; the mean KL divergence of a latent.
        """
        generator = torch.Generator(images.device).manual_seed(seed)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_alone):
            posterior = self.autoencoder.encode(images).latent_dist
            latents = posterior.sample(generator)
        if self.decoder_alone:
            share = DECODER_NOISE * torch.rand(1, generator=generator, device=images.device)
            noise = torch.randn(latents.shape, generator=generator, device=images.device)
            latents = latents + share * latents.std() * noise.to(latents)
        repeated = self.autoencoder.decode(latents).sample
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        return repeated.float(), posterior.mean[:, :3].float(), divergence


def to_tensor(images: np.ndarray) -> Tensor:
    """Turn 8-bit RGB, (count, height, width, 3), into float RGB in -1..1, (count, 3, height, width)."""
    return (
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1.0
    )


@torch.no_grad()
def normalise_latents(autoencoder: Any, images: np.ndarray, mixed_precision: str) -> None:
    """Fold each latent channel's mean and spread into the autoencoder, so that SD's scaling factor fits it.

    Args:
        autoencoder: Changed in place: its latents get mean 0 and standard deviation 1 / ``SCALING_FACTOR``.
        images: 8-bit RGB to measure on, (count, size, size, 3).
        mixed_precision: Accelerate's.
    """
    latents = encode(autoencoder, images, mixed_precision)
    mean = latents.mean(dim=(0, 2, 3))
    factor = 1.0 / (SCALING_FACTOR * latents.std(dim=(0, 2, 3)))
    towards, back = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight /= factor[None, :, None, None]
    towards.weight[:channels] *= factor[:, None, None, None]
    towards.bias[:channels] = (towards.bias[:channels] - mean) * factor
    towards.bias[channels:] += 2 * factor.log()


@torch.no_grad()
def encode(autoencoder: Any, images: np.ndarray, mixed_precision: str) -> Tensor:
    """Encode images to unscaled latents, (count, 4, size / 8, size / 8), on the CPU."""
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    accelerator = Accelerator(mixed_precision=mixed_precision)
    parts: list[Tensor] = []
    for start in tqdm(range(0, len(images), ENCODE_BATCH), "encoding", mininterval=5):
        batch = to_tensor(images[start : start + ENCODE_BATCH]).to(autoencoder.device)
        with accelerator.autocast():
            parts.append(autoencoder.encode(batch).latent_dist.mode().float().cpu())
    return torch.cat(parts)


def fit_preview(latents: Tensor, images: np.ndarray) -> dict[str, list[Any]]:
    """Find the linear map from latents to colours, for previews while an image is drawn.

    Args:
        latents: Scaled latents of the images, (count, 4, height, width).
        images: 8-bit RGB, (count, 8 height, 8 width, 3).

    Returns:
        ``factors``, 4 rows of 3, and ``bias``, 3 numbers: latent @ factors + bias is the patch's colour in -1..1.
    """
    colours = functional.avg_pool2d(to_tensor(images), PATCH).movedim(1, -1).flatten(0, 2)
    known = latents.float().movedim(1, -1).flatten(0, 2)
    known = torch.cat([known, torch.ones_like(known[:, :1])], dim=1)
    solution = torch.linalg.lstsq(known, colours).solution
    rounded: list[list[float]] = [[round(value, 4) for value in row] for row in solution.tolist()]
    return {"factors": rounded[:-1], "bias": rounded[-1]}
