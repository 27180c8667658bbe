"""Images that show the method: subjects from reference images in new scenes, beside the same seeds without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..images.sheets import contact_sheet
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


@dataclass(frozen=True, eq=False)
class Theme:
    """One reference image with the prompts that it is shown in.

    Attributes:
        name: Name of its files.
        reference: The reference image, (1, height, width, 3) in [0, 1].
        mask: Where the subject is on it, (1, height, width) in [0, 1]; ``None``: not known.
        prompts: What to draw.
        subject: Who is drawn in ``SCENES_SHOWN``; ``None`` where image or prompt are the user's own.
    """

    name: str
    reference: Tensor
    mask: Tensor | None
    prompts: Sequence[str]
    subject: Subject | None = None


@dataclass(frozen=True, eq=False)
class Panel:
    """What was drawn of a theme.

    Attributes:
        theme: The theme.
        images: An image for each prompt, (prompts, height, width, 3) in [0, 1], ``with_reference`` and, of the same
            seeds, ``without_reference``.
    """

    theme: Theme
    images: Mapping[str, Tensor]


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
        themes.append(Theme(shape, cutout[..., :3], cutout[..., 3], prompts, subject))
    return themes


def draw_panel(
    pipeline: DreamCachePipeline,
    adapters: AdapterSet,
    theme: Theme,
    seed: int,
    *,
    steps: int,
    guidance_scale: float,
    image_guidance_scale: float,
) -> Panel:
    """Draw a theme with and without its reference, from the same noise.

    Args:
        pipeline: The demo's model.
        adapters: Its adapters.
        theme: What to draw.
        seed: Image number p is drawn from ``seed + p``.
        steps: Sampling steps.
        guidance_scale: s_text of METHOD.md section 5.
        image_guidance_scale: s_image of it, in the part ``IMAGE_RANGE`` of the run.
    """
    cache = pipeline.encode_reference(theme.reference, mask=theme.mask, adapters=adapters)

    def draw(uses: Sequence[ReferenceUse]) -> Tensor:
        seeds = range(seed, seed + len(theme.prompts))
        images = pipeline(
            list(theme.prompts),
            uses,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            image_range=IMAGE_RANGE,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(each) for each in seeds],
            output_type="pt",
        )
        return images.permute(0, 2, 3, 1)

    with_reference = draw([ReferenceUse(cache, adapters)])
    return Panel(theme, {"with_reference": with_reference, "without_reference": draw([])})


def draw_sheet(panels: Sequence[Panel]) -> Tensor:
    """Lay panels out: references across the top, two columns each: with the reference, and without.

    Args:
        panels: Panels with equally many prompts.

    Returns:
        The sheet, (1, height, width, 3) in [0, 1].
    """
    blank = torch.ones_like(panels[0].theme.reference)
    rows = [[image for panel in panels for image in (panel.theme.reference, blank)]]
    captions = [["reference", ""] * len(panels)]
    for number in range(len(panels[0].theme.prompts)):
        rows.append([images[number, None] for panel in panels for images in panel.images.values()])
        texts = ((panel.theme.prompts[number], "same seed, no reference") for panel in panels)
        captions.append([text for pair in texts for text in pair])
    return contact_sheet(rows, captions, cell_px=160)
