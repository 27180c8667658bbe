"""The three-term guidance rule and its cheaper forms (METHOD.md section 5). Knows tensors only."""

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

from torch import Tensor

from ..config import Config
from ..errors import InputError

GuidanceMode = Literal["separate", "joint"]
Prediction = Literal["unconditional", "reference_only", "reference_and_text"]


@dataclass(frozen=True)
class Guidance(Config):
    """How predictions are combined.

    Attributes:
        image_guidance_scale: s_image: how far the result moves from no reference (0) to the reference's prediction (1) and
            beyond.
        mode: ``separate``: the three-term rule. ``joint``: text and reference are one condition with one scale, the
            text's; two predictions, and ``image_guidance_scale`` has no effect.
        image_range: Part of the run, from (inclusive) and to (exclusive) as shares of its noise levels, 0 to 1, in
            which ``image_guidance_scale`` holds. Outside it counts as 1, which needs two predictions instead of three.
    """

    image_guidance_scale: float = 1.0
    mode: GuidanceMode = "separate"
    image_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: ``mode`` is unknown, ``image_guidance_scale`` no finite number or ``image_range`` no part of the run.
        """
        if self.mode not in ("separate", "joint"):
            raise InputError(f"guidance must be 'separate' or 'joint'; given {self.mode!r}.")
        scale = self.image_guidance_scale
        if not isinstance(scale, Real) or not math.isfinite(scale):
            raise InputError(f"image_guidance must be a finite number; given {scale!r}.")
        try:
            start, end = map(float, self.image_range)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"Expected the range of image_guidance to be two numbers; given {self.image_range!r}."
            ) from error
        if not 0 <= start < end <= 1:
            raise InputError(
                f"The range of image_guidance must be from 0 to 1 with its start before its end; given {start} to {end}. "
                "To do without it, set image_guidance to 1."
            )

    @property
    def needs_unconditional(self) -> bool:
        """Whether the prediction without a reference takes part as a third term."""
        return self.mode == "separate" and self.image_guidance_scale != 1.0

    def at(self, progress: float) -> "Guidance":
        """Return the guidance of one step.

        Args:
            progress: Share of the training timesteps that lies behind, 0 at pure noise to 1.
        """
        start, end = self.image_range
        # both ends of the run belong to it, wherever a scheduler puts its first and last step
        return self.step((start <= progress or start == 0) and (progress < end or end == 1))

    def step(self, is_in_range: bool) -> "Guidance":
        """Return the guidance of one step, given whether the step is in the range."""
        scale = self.image_guidance_scale if is_in_range else 1.0
        return replace(self, image_guidance_scale=scale, image_range=(0.0, 1.0))


def needed_predictions(guidance: Guidance, guidance_scale: float) -> tuple[Prediction, ...]:
    """List the predictions that a step cannot do without.

    Source: METHOD.md section 5, "Fewer evaluations where algebra allows".

    Args:
        guidance: How they are combined.
        guidance_scale: s_text; 1 needs no prediction for the negative text unless ``image_guidance_scale`` asks for it.

    Returns:
        One, two or three of the predictions, in the order of ``combine_guidance``'s arguments.
    """
    if guidance.needs_unconditional:
        return ("unconditional", "reference_only", "reference_and_text")
    if guidance_scale == 1.0:
        return ("reference_and_text",)
    if guidance.mode == "joint":
        return ("unconditional", "reference_and_text")
    return ("reference_only", "reference_and_text")


def combine_guidance(
    unconditional: Tensor,
    reference_only: Tensor,
    reference_and_text: Tensor,
    *,
    guidance_scale: float,
    image_guidance_scale: float,
) -> Tensor:
    """Combine three predictions into one.

    Source: METHOD.md section 5: ``e_u + s_text (e_ct - e_c) + s_image (e_c - e_u)``. Linear, so it holds for eps, v
    and denoised predictions alike.

    Args:
        unconditional: e_u, negative text without reference, any shape.
        reference_only: e_c, negative text with reference, same shape.
        reference_and_text: e_ct, prompt with reference, same shape.
        guidance_scale: s_text, unitless; 7.5 in the paper.
        image_guidance_scale: s_image, unitless; 0.4 in the paper. At 1 ``unconditional`` cancels.

    Returns:
        Same shape.
    """
    text_term = guidance_scale * (reference_and_text - reference_only)
    return unconditional + text_term + image_guidance_scale * (reference_only - unconditional)


def fold_guidance(
    unconditional: Tensor,
    reference_only: Tensor,
    reference_and_text: Tensor,
    *,
    image_guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """Turn three predictions into two on which ordinary classifier-free guidance gives the three-term rule.

    ``u' = e_u + s_image (e_c - e_u)``, ``c' = u' + (e_ct - e_c)``; then ``u' + s_text (c' - u')`` is METHOD.md
    section 5.

    Args:
        unconditional: e_u, any shape.
        reference_only: e_c, same shape.
        reference_and_text: e_ct, same shape.
        image_guidance_scale: s_image.

    Returns:
        ``c'`` and ``u'``, in ComfyUI's order: conditional first.
    """
    folded = unconditional + image_guidance_scale * (reference_only - unconditional)
    return folded + (reference_and_text - reference_only), folded
