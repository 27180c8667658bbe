"""The sampling loop: from noise to latents by the three predictions of METHOD.md section 5."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..method.blending import ReferenceUse
from ..method.guidance import Guidance, Prediction, combine_guidance, needed_predictions
from ..method.injection import Injection, inject
from .arguments import Generators

Callback = Callable[[int, int, Tensor], None]
"""Called after every step with its index, the timestep and the latents."""


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts: text states (rows, tokens, width) and, for SDXL, the pooled vectors (rows, width)."""

    states: Tensor
    pooled: Tensor | None

    def repeat_each(self, times: int) -> "Text":
        """Repeat every row so many times, one after the other."""
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(times, dim=0)
        return Text(self.states.repeat_interleave(times, dim=0), pooled)

    @staticmethod
    def join(texts: Sequence["Text"]) -> "Text":
        """Put the rows of several one below the other."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return Text(
            torch.cat([text.states for text in texts]), torch.cat(pooled) if pooled else None
        )

    def conditions(self, height_px: int, width_px: int) -> dict[str, Any]:
        """Further arguments of the U-Net: SDXL's pooled text and time ids (METHOD.md section 3), else none."""
        if self.pooled is None:
            return {}
        ids = [height_px, width_px, 0, 0, height_px, width_px]
        time_ids = self.pooled.new_tensor([ids] * len(self.pooled))
        return {"added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": time_ids}}


def denoise(
    unet: nn.Module,
    scheduler: Any,
    noise: Tensor,
    texts: Mapping[Prediction, Text],
    uses: Sequence[ReferenceUse],
    *,
    guidance: Guidance,
    guidance_scale: float,
    num_steps: int,
    size_px: tuple[int, int],
    generators: Generators,
    callback: Callback | None,
) -> Tensor:
    """Run the scheduler's steps, each with one U-Net call for all predictions that it needs.

    Source: METHOD.md section 5.

    Args:
        unet: diffusers' ``UNet2DConditionModel``.
        scheduler: diffusers' scheduler.
        noise: Of unit variance, (images, channels, height, width).
        texts: Text of each prediction that a step may need, a row for each image.
        uses: References with adapters that fit the U-Net's device and float type.
        guidance: How the predictions are combined.
        guidance_scale: s_text.
        num_steps: Steps of the scheduler.
        size_px: Height and width of the images.
        generators: Of the noise that ancestral schedulers add.
        callback: Called after every step.

    Returns:
        Latents, as ``noise``.
    """
    scheduler.set_timesteps(num_steps, device=noise.device)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if takes_generator else {}
    progress = 1 - scheduler.timesteps.cpu().double() / (scheduler.config.num_train_timesteps - 1)
    latents = noise * scheduler.init_noise_sigma
    with inject(unet, uses) as injection:
        predictor = _Predictor(unet, injection, texts, size_px)
        for index, timestep in enumerate(scheduler.timesteps):
            needed = needed_predictions(guidance.at(float(progress[index])), guidance_scale)
            scaled = scheduler.scale_model_input(latents, timestep)
            predictions = predictor(scaled, timestep, needed)
            eps = _combine(predictions, guidance_scale, guidance.image_guidance_scale)
            latents = scheduler.step(eps, timestep, latents, return_dict=False, **options)[0]
            if callback is not None:
                callback(index, int(timestep), latents)
    return latents


def _combine(predictions: Sequence[Tensor], s_text: float, s_image: float) -> Tensor:
    """Combine what ``needed_predictions`` listed."""
    if len(predictions) == 1:  # e_ct
        return predictions[0]
    if len(predictions) == 2:
        e, e_ct = predictions  # e is e_c where s_image is 1, e_u in joint guidance
        return e + s_text * (e_ct - e)
    e_u, e_c, e_ct = predictions
    return combine_guidance(e_u, e_c, e_ct, guidance_scale=s_text, image_guidance_scale=s_image)


class _Predictor:
    """Calls a U-Net with a block of rows, one row for each image, for each prediction."""

    def __init__(
        self,
        unet: nn.Module,
        injection: Injection,
        texts: Mapping[Prediction, Text],
        size_px: tuple[int, int],
    ) -> None:
        self.unet, self.injection, self.texts, self.size_px = unet, injection, texts, size_px
        self.needed: tuple[Prediction, ...] = ()
        self.options: dict[str, Any] = {}

    def __call__(
        self, latents: Tensor, timestep: Tensor, needed: tuple[Prediction, ...]
    ) -> tuple[Tensor, ...]:
        if needed != self.needed:
            self.needed = needed
            text = Text.join([self.texts[prediction] for prediction in needed])
            self.options = {
                "encoder_hidden_states": text.states,
                **text.conditions(*self.size_px),
            }
            self.injection.choose_rows([p != "unconditional" for p in needed for _ in latents])
        rows = latents.repeat(len(needed), 1, 1, 1)
        return self.unet(rows, timestep, return_dict=False, **self.options)[0].chunk(len(needed))
