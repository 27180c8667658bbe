"""Adapters without training: the model's own self-attention, read from a reference, its weights set by measurement."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import check_range
from ..method.adapter import AdapterInfo, AdapterSet
from ..method.backends import select_sites
from ..method.compiling import plain_module
from ..method.layers import Layout
from .noise_schedule import NUM_TIMESTEPS, NoiseSchedule
from .self_attention import observe_self_attention, start_from_self_attention

FITTED = "fitted"
"""Entry of the metadata of fitted adapters: their settings, as JSON."""

NUM_LATENTS, NUM_STEPS, NUM_LOOKS = 8, 12, 4
NUM_PASSES = NUM_LATENTS * (NUM_STEPS + NUM_LOOKS)
"""Calls of the U-Net, one row each."""


SAME_BIASES = 5e-3
"""Up to this relative difference, several times what rounding to bfloat16 makes, biases are the same."""


@torch.no_grad()
def fitted_to_another(unet: nn.Module, adapters: AdapterSet) -> bool:
    """Whether adapters were fitted, and that to another checkpoint: told by a bias that they have copied.

    LoRAs leave biases alone, so one that came or went is not told.

    Raises:
        UnsupportedModelError: The model is not a supported U-Net.
    """
    if FITTED not in adapters.info.extra:
        return False
    own, copied = list[Tensor](), list[Tensor]()
    for name, site in select_sites(plain_module(unet), adapters.layers).items():
        adapter: Any = adapters[name]
        own.append(site.block.attn1.to_out[0].bias.float().cpu())
        copied.append(adapter.to_out.bias.float())
    difference = torch.cat(own) - torch.cat(copied)
    return bool(difference.norm() > SAME_BIASES * torch.cat(own).norm())


def without_fit(extra: Mapping[str, str]) -> dict[str, str]:
    """Metadata of fitted adapters once they have been trained."""
    return {key: value for key, value in extra.items() if key != FITTED}


@dataclass(frozen=True)
class FitSettings:
    """What fitted adapters are made with; docs/fitting.md tells how the defaults were found.

    Attributes:
        timestep: Training index at which references are cached, 0 to 999.
        reference_share: Share of the reference in ``merge``, 0 to 1; the rest is the image's own.
        query_scale: How much sharper than self-attention the reference is attended to; 1: as sharp.
    """

    timestep: int = 300
    reference_share: float = 0.6
    query_scale: float = 1.25

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: One is out of range.
        """
        check_range("timestep", self.timestep, 0, NUM_TIMESTEPS - 1)
        check_range("reference_share", self.reference_share, 0, 1)
        check_range("query_scale", self.query_scale, 0)


DEFAULTS = FitSettings()


class Predict(Protocol):
    """A base model with the empty prompt."""

    def __call__(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise a latent and let the whole plain U-Net predict.

        Args:
            latent: Scaled latent, (1, channels, height, width), float32 on the CPU.
            noise: Unit noise, same shape.
            timesteps: Training index, int64 (1,).

        Returns:
            Predicted noise or v, same shape, on any device.
        """
        ...


@torch.no_grad()
def fit_adapters(
    unet: nn.Module,
    predict: Predict,
    schedule: NoiseSchedule,
    layout: Layout,
    shape: tuple[int, int, int],
    *,
    settings: FitSettings = DEFAULTS,
    seed: int = 0,
    on_pass: Callable[[], Any] = lambda: None,
) -> AdapterSet:
    """Make adapters of a model's own self-attention; no weight is trained.

    The model draws a few latents, by DDIM with the empty prompt; on these it is fitted by least squares what self-attention
    reads from the map that enters a layer. ``merge`` mixes what self-attention reads in the new image with what it reads in
    the reference. Source: METHOD.md section 4 for the form; the numbers are those of docs/fitting.md.

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel``.
        predict: Calls it.
        schedule: Its noise levels.
        layout: Layers to adapt, and its other widths.
        shape: Channels, height and width of the latents to draw.
        settings: Numbers of the adapters.
        seed: Decides everything; the global random state is left alone.
        on_pass: Called after each of the ``NUM_PASSES`` calls.

    Returns:
        The adapters, float32 on the CPU.

    Raises:
        StateError: The model predicts NaN or infinity.
        UnsupportedModelError: The model is not a supported U-Net, or another package has replaced its self-attention.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw_noise() -> Tensor:
        return torch.randn((1, *shape), generator=generator)

    def call(latent: Tensor, noise: Tensor, timestep: int) -> Tensor:
        prediction = predict(latent, noise, torch.tensor([timestep])).float().cpu()
        on_pass()
        return prediction

    metadata = {FITTED: json.dumps({**asdict(settings), "seed": seed})}
    timestep = settings.timestep
    info = AdapterInfo(layout, timestep, prediction=schedule.prediction, extra=metadata)
    latents = [draw_latent(call, schedule, draw_noise()) for _ in range(NUM_LATENTS)]
    # ComfyUI calls this in inference mode, whose tensors could never be trained
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        adapters = AdapterSet(info)
    with observe_self_attention(unet, adapters.layers) as guesses:
        for latent in latents:
            for _ in range(NUM_LOOKS):
                call(latent, draw_noise(), timestep)
    start_from_self_attention(unet, adapters, guesses)
    share = settings.reference_share
    for layer in adapters:
        adapter: Any = adapters[layer]
        identity = torch.eye(adapter.channels)
        adapter.to_q.weight.mul_(settings.query_scale)
        adapter.merge.weight.copy_(torch.cat([(1 - share) * identity, share * identity], dim=1))
        adapter.merge.bias.zero_()
    return adapters


def draw_latent(
    predict: Callable[[Tensor, Tensor, int], Tensor], schedule: NoiseSchedule, noise: Tensor
) -> Tensor:
    """Draw a latent by DDIM without noise of its own (Song et al., ICLR 2021, arXiv 2010.02502, equation 12).

    Args:
        predict: From latent, noise and timestep to the prediction, all of one row.
        schedule: Noise levels.
        noise: Unit noise to start from, (1, channels, height, width).

    Returns:
        Scaled latent, same shape.
    """
    latent = torch.zeros_like(noise)
    for step in range(NUM_STEPS):
        timestep = round(NUM_TIMESTEPS * (1 - step / NUM_STEPS)) - 1
        timesteps = torch.tensor([timestep])
        noised = schedule.add_noise(latent, noise, timesteps)
        latent, noise = schedule.split(noised, predict(latent, noise, timestep), timesteps)
    return latent
