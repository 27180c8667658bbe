"""What ``dreamcache demo`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from ..errors import InputError
from ..method.guidance import Guidance
from .gallery import GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE, STEPS
from .world.shapes import SHAPES


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Config):
    """Draw subjects in new scenes, with the small model that comes along.

    Attributes:
        out: Folder for the images.
        seed: Decides subjects and noise.
        subject: Show one shape only: mug, fish, house, ...
        prompt: One prompt of your own for all.
        reference: An image of your own as the reference.
        steps: Sampling steps.
        cfg: Text guidance.
        image_guidance: Image guidance.
    """

    out: str = "demo"
    seed: int = 2
    subject: str | None = None
    prompt: str | None = None
    reference: str | None = None
    steps: int = STEPS
    cfg: float = GUIDANCE_SCALE
    image_guidance: float = IMAGE_GUIDANCE_SCALE

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded.

        Raises:
            InputError: A value is out of range, or the shape is none that the world has.
        """
        if self.subject is not None and self.subject not in SHAPES:
            raise InputError(
                f"--subject must be one of {', '.join(SHAPES)}; given {self.subject!r}. An image of anything else "
                "goes to --reference."
            )
        Guidance(self.image_guidance)
        if self.steps < 1 or not 0 <= self.seed < 2**63:
            raise InputError(
                f"--steps must be at least 1 and --seed in 0 ... 2^63 - 1; given {self.steps} and {self.seed}."
            )
