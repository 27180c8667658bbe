"""The conditions under which the demo model is measured: guidance, references, and variants of the adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dreamcache_core.demo.gallery import GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE, IMAGE_RANGE
from dreamcache_core.fitting.noise_schedule import NUM_TIMESTEPS
from dreamcache_core.method.guidance import Guidance, GuidanceMode, needed_predictions

SHIPPED = "adapters"
"""Variant that comes with the package."""

WHOLE_RUN = (0.0, 1.0)

CAPTION = "caption"
"""Variant that was trained on references cached under the wanted image's caption, and is measured so."""


@dataclass(frozen=True)
class Condition:
    """One way to generate the triples' images.

    Attributes:
        name: Name of its results.
        sweep: What it is compared within.
        adapters: Name of the adapters' variant; ``None``: no reference.
        guidance_scale: s_text (METHOD.md section 5).
        image_guidance_scale: s_image.
        mode: ``separate`` or ``joint``.
        image_range: Part of the run in which ``image_guidance_scale`` holds.
        references: Images of the subject, their tokens concatenated.
        captioned: Whether the reference pass sees the prompt of the wanted image; else the empty one.
        masked: Whether the subject is marked in the reference; else all tokens are attended to alike, as in training.
    """

    name: str
    sweep: str
    adapters: str | None = SHIPPED
    guidance_scale: float = GUIDANCE_SCALE
    image_guidance_scale: float = IMAGE_GUIDANCE_SCALE
    mode: GuidanceMode = "separate"
    image_range: tuple[float, float] = IMAGE_RANGE
    references: int = 1
    captioned: bool = False
    masked: bool = False

    def predictions_a_step(self, steps: int) -> float:
        """How many rows of the U-Net an image's step takes on average: what the condition costs."""
        guidance = Guidance(self.image_guidance_scale, self.mode, self.image_range)
        if self.adapters is None:
            guidance = Guidance(mode="joint")
        stride = NUM_TIMESTEPS / steps  # of the demo's scheduler, from the last timestep on
        passed = [NUM_TIMESTEPS - round(NUM_TIMESTEPS - i * stride) for i in range(steps)]
        counts = [
            len(needed_predictions(guidance.at(each / (NUM_TIMESTEPS - 1)), self.guidance_scale))
            for each in passed
        ]
        return sum(counts) / steps

    @property
    def drawing(self) -> Condition:
        """The same without its names: equal for conditions that draw the same images."""
        return replace(self, name="", sweep="")


NO_REFERENCE = Condition("no reference", "baseline", adapters=None)
CHOSEN = Condition("as shipped", "baseline", masked=True)


def all_conditions(variants: Sequence[str] = ()) -> list[Condition]:
    """Every condition: without a reference, as shipped, and sweeps of one thing each.

    Args:
        variants: Names of adapters that were trained otherwise than the shipped ones.
    """
    image = {
        f"image guidance {scale:g}": {"image_guidance_scale": scale, "image_range": WHOLE_RUN}
        for scale in (0.0, 0.4, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    }
    scales = (1.0, 2.0, 3.0, 5.0, 7.5)
    text = {f"text guidance {scale:g}": {"guidance_scale": scale} for scale in scales}
    joint = {f"joint {scale:g}": {"guidance_scale": scale, "mode": "joint"} for scale in scales}
    ranges = {
        f"guidance range {start:g} to {end:g}": {"image_range": (start, end)}
        for start, end in ((0.0, 0.25), (0.0, 0.5), (0.0, 0.75), WHOLE_RUN, (0.5, 1.0))
    }
    references = {
        "1 reference": {},
        "2 references": {"references": 2},
        "4 references": {"references": 4},
        "subject not marked": {"masked": False},
    }
    trained = {
        f"variant {name}": {"adapters": name, "captioned": name == CAPTION} for name in variants
    }
    return [
        NO_REFERENCE,
        CHOSEN,
        *_sweep("image guidance", image),
        *_sweep("text guidance", text),
        *_sweep("joint", joint),
        *_sweep("guidance range", ranges),
        *_sweep("references", references),
        *_sweep("caption", {"captioned reference": {"captioned": True}}),
        *_sweep("variants", trained),
    ]


def _sweep(sweep: str, conditions: Mapping[str, Mapping[str, Any]]) -> Iterator[Condition]:
    """What ships, changed as each name says."""
    for name, changes in conditions.items():
        yield replace(CHOSEN, name=name, sweep=sweep, **changes)
