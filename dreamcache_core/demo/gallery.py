"""Images that show the method: subjects from reference images in new scenes, beside the same seeds without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..images.files import contact_sheet
from ..images.tensors import image_to_tensor
from ..method.adapter import AdapterSet
from ..method.blending import ReferenceUse
from ..pipeline.pipeline import DreamCachePipeline
from .world.world import Scene, Subject, draw_subject, render_cutout, write_caption

STEPS = 16
GUIDANCE_SCALE = 2.0
IMAGE_GUIDANCE_SCALE = 3.0
IMAGE_RANGE = (0.0, 0.75)

SHAPES_SHOWN = ("mug", "fish", "house", "star")
SCENES_SHOWN = (Scene("grass"), Scene("night"), Scene("beach", place="left"))


@dataclass(frozen=True)
class Sampling:
    """How the demo's images are sampled.

    Attributes:
        steps: Sampling steps.
        guidance_scale: s_text of METHOD.md section 5.
        image_guidance_scale: s_image of it.
        image_range: Part of the run in which it holds, as in ``Guidance``.
    """

    steps: int = STEPS
    guidance_scale: float = GUIDANCE_SCALE
    image_guidance_scale: float = IMAGE_GUIDANCE_SCALE
    image_range: tuple[float, float] = IMAGE_RANGE


@dataclass(frozen=True)
class Theme:
    """One reference image with the prompts that it is shown in.

    Attributes:
        name: Name of its files.
        reference: The reference image, (1, height, width, 3) in [0, 1].
        mask: Where the subject is on it, (1, height, width) in [0, 1]; ``None``: not known.
        prompts: What to draw.
        scenes: The scenes that these describe, where the world knows them.
        subject: Who is on the image; ``None`` for an image of the user's own.
    """

    name: str
    reference: Tensor
    mask: Tensor | None
    prompts: Sequence[str]
    scenes: Sequence[Scene] = ()
    subject: Subject | None = None


@dataclass(frozen=True, eq=False)
class Panel:
    """What was drawn of a theme.

    Attributes:
        theme: The theme.
        with_reference: An image for each prompt, (prompts, height, width, 3) in [0, 1].
        without_reference: The same seeds and prompts, likewise.
    """

    theme: Theme
    with_reference: Tensor
    without_reference: Tensor


def choose_themes(seed: int, shapes: Sequence[str] = SHAPES_SHOWN) -> list[Theme]:
    """Draw a subject of each shape that adapter training has not seen in these colours.

    Args:
        seed: Decides patterns, colours and poses.
        shapes: Their shapes, keys of ``SHAPES``.
    """
    random = np.random.default_rng(seed)
    themes: list[Theme] = []
    for shape in shapes:
        while not (subject := draw_subject(random, shape)).is_unseen:
            pass
        prompts = [
            write_caption(subject, scene, random, name_pattern=False) for scene in SCENES_SHOWN
        ]
        cutout = image_to_tensor(render_cutout(subject, random))
        image, mask = cutout[..., :3], cutout[..., 3]
        themes.append(Theme(shape, image, mask, prompts, SCENES_SHOWN, subject))
    return themes


def draw_panels(
    pipeline: DreamCachePipeline,
    adapters: AdapterSet,
    themes: Sequence[Theme],
    seed: int,
    sampling: Sampling,
) -> Iterator[Panel]:
    """Draw every theme with and without its reference, from the same noise.

    Args:
        pipeline: The demo's model.
        adapters: Its adapters.
        themes: What to draw.
        seed: Image number p of a theme is drawn from ``seed + p``.
        sampling: How.

    Yields:
        The panels, one after the other.
    """
    for theme in themes:
        reference = pipeline.encode_reference(
            theme.reference, mask=theme.mask, layers=adapters.layers
        )
        images = [
            sample(pipeline, uses, theme.prompts, seed, sampling)
            for uses in ([ReferenceUse(reference, adapters)], [])
        ]
        yield Panel(theme, *images)


def sample(
    pipeline: DreamCachePipeline,
    uses: Sequence[ReferenceUse],
    prompts: Sequence[str],
    seed: int,
    sampling: Sampling,
) -> Tensor:
    """Draw an image for each prompt.

    Args:
        pipeline: The demo's model.
        uses: References; none of them: ordinary images.
        prompts: What to draw.
        seed: Image number p is drawn from ``seed + p``.
        sampling: How.

    Returns:
        (prompts, height, width, 3) in [0, 1].
    """
    images = pipeline(
        list(prompts),
        uses,
        guidance_scale=sampling.guidance_scale,
        image_guidance_scale=sampling.image_guidance_scale,
        image_range=sampling.image_range,
        num_inference_steps=sampling.steps,
        generator=[torch.Generator().manual_seed(seed + number) for number in range(len(prompts))],
        output_type="pt",
    )
    return images.permute(0, 2, 3, 1)


def draw_sheet(panels: Sequence[Panel]) -> Tensor:
    """Lay panels out: references across the top, two columns each: with the reference, and without.

    Args:
        panels: Panels with equally many prompts.

    Returns:
        The sheet, (1, height, width, 3) in [0, 1].
    """
    blank = torch.ones_like(panels[0].theme.reference)
    rows = [[image for panel in panels for image in (panel.theme.reference, blank)]]
    captions = [[text for _ in panels for text in ("reference", "")]]
    for number in range(len(panels[0].theme.prompts)):
        rows.append(
            [
                images[number : number + 1]
                for panel in panels
                for images in (panel.with_reference, panel.without_reference)
            ]
        )
        captions.append(
            [
                text
                for panel in panels
                for text in (panel.theme.prompts[number], "same seed, no reference")
            ]
        )
    return contact_sheet(rows, captions, cell_px=160)
