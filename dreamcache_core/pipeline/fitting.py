"""Adapters from the model of a pipeline, without a file and without training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..fitting.fit import DEFAULTS, FitSettings, fit_adapters
from ..fitting.noise_schedule import NoiseSchedule
from ..method.adapter import AdapterSet
from ..method.backends import backend_for, layout_of
from .pipeline import DreamCachePipeline


@torch.no_grad()
def adapters_from_model(
    pipeline: DreamCachePipeline,
    *,
    layers: Sequence[str] | None = None,
    settings: FitSettings = DEFAULTS,
    size: int | None = None,
    seed: int = 0,
    on_pass: Callable[[], Any] = lambda: None,
) -> AdapterSet:
    """Make adapters of a model's own self-attention: seconds on a GPU, nothing is trained; see ``fit_adapters``.

    Args:
        pipeline: The model; LoRAs that are loaded count.
        layers: Canonical names of the layers to adapt; ``None`` takes METHOD.md's rule.
        settings: Numbers of the adapters.
        size: Side in pixels of the images that it draws, a multiple of 8; ``None``: the model's own.
        seed: Decides everything; the global random state is left alone.
        on_pass: Called after each of ``fitting.fit.NUM_PASSES`` calls of the U-Net.

    Returns:
        The adapters, float32 on the CPU; references for them are cached at their own timestep (``info.timestep``).

    Raises:
        InputError: The size is no multiple of 8.
        MismatchError: The U-Net has no layer of that name.
        StateError: The model predicts NaN or infinity.
        UnsupportedModelError: The scheduler has no table of noise levels, or the model's self-attention was replaced.
    """
    height, width = (size, size) if size is not None else pipeline.default_size_px
    factor = pipeline.pipeline.vae_scale_factor
    if height % factor or width % factor or min(height, width) < factor:
        raise InputError(f"size must be a multiple of {factor}; given {size}.")
    unet = pipeline.pipeline.unet
    schedule = NoiseSchedule(
        pipeline.alphas_cumprod, pipeline.pipeline.scheduler.config.prediction_type
    )
    text = pipeline.encode_text([""])

    def predict(latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noised = schedule.add_noise(latent, noise, timesteps).to(pipeline.device, pipeline.dtype)
        return backend_for(unet).call(
            unet,
            noised,
            timesteps.to(pipeline.device),
            text.states,
            **text.conditions(height, width),
        )

    adapters = fit_adapters(
        unet,
        predict,
        schedule,
        layout_of(unet, layers),
        (unet.config.in_channels, height // factor, width // factor),
        settings=settings,
        seed=seed,
        on_pass=on_pass,
    )
    pipeline.pipeline.maybe_free_model_hooks()
    return adapters
