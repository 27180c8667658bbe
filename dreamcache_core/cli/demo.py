"""``dreamcache demo``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config import Config
from ..demo.gallery import GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE, STEPS
from ..demo.world.shapes import SHAPES
from ..errors import InputError
from ..method.guidance import Guidance
from .flags import parse_config


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Config):
    """Draw subjects from reference images in new scenes, with the small model that comes along; no download."""

    out: str = field(default="demo", metadata={"help": "folder for the images"})
    seed: int = field(default=2, metadata={"help": "decides subjects and noise"})
    subject: str | None = field(
        default=None, metadata={"help": "show one shape only: mug, fish, house ..."}
    )
    prompt: str | None = field(default=None, metadata={"help": "one prompt of your own for all"})
    reference: str | None = field(
        default=None, metadata={"help": "an image of your own as the reference"}
    )
    steps: int = field(default=STEPS, metadata={"help": "sampling steps"})
    cfg: float = field(default=GUIDANCE_SCALE, metadata={"help": "text guidance"})
    image_guidance: float = field(default=IMAGE_GUIDANCE_SCALE, metadata={"help": "image guidance"})

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


def run(argv: Sequence[str]) -> None:
    """Draw the demo.

    Args:
        argv: Arguments after ``demo``.
    """
    options = parse_config(DemoOptions, argv, program="dreamcache demo")
    from ..demo.show import show_demo

    for line in show_demo(options):
        print(line)
