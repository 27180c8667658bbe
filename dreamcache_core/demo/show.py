"""What ``dreamcache demo`` does: load the model that comes along, draw, and write images and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MissingPackageError
from ..images.files import read_image, save_png
from ..images.reference import prepare_reference_image
from ..method.adapter_files import load_adapters
from ..pipeline.loading import load_diffusers_pipeline
from ..pipeline.pipeline import DreamCachePipeline
from .files import require_demo_files
from .gallery import (
    IMAGE_RANGE,
    SCENES_SHOWN,
    Panel,
    Theme,
    choose_themes,
    draw_panel,
    draw_sheet,
)
from .measures.classifier import load_classifier, recognise
from .measures.match import measure_match
from .options import DemoOptions
from .world.world import IMAGE_SIZE, with_article

SHEET = "contact_sheet.png"
METADATA_KEY = "dreamcache"
OWN_SCENES = ("on the grass", "at night", "on the beach, left")
FILL = 0.85


def show_demo(options: DemoOptions, folder: Path | None = None) -> Iterator[str]:
    """Draw the demo's images and write them.

    Args:
        options: What to draw and where to write it.
        folder: Holds the model and its adapters; ``None`` takes what came with the package.

    Yields:
        Lines that tell what was made.

    Raises:
        DreamCacheError: The model or the reference image cannot be read.
        OSError: A file could not be written.
    """
    files = require_demo_files(folder)
    themes = _themes(options)
    pipeline = DreamCachePipeline(load_diffusers_pipeline(files.model))
    adapters = load_adapters(files.adapters)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    panels: list[Panel] = []
    for theme in themes:
        panel = draw_panel(
            pipeline,
            adapters,
            theme,
            options.seed,
            steps=options.steps,
            guidance_scale=options.cfg,
            image_guidance_scale=options.image_guidance,
        )
        panels.append(panel)
        _write(panel, out, options)
        yield f"{theme.name}: {len(theme.prompts)} images with and without reference"
    save_png(out / SHEET, draw_sheet(panels))
    try:
        yield from _measured(panels)
    except MissingPackageError as error:
        yield f"Not measured: {error}"
    yield f"Look at {out / SHEET}"


def _themes(options: DemoOptions) -> Sequence[Theme]:
    if options.reference is not None:
        shape = with_article(options.subject or "ball")
        prompts = [f"{shape} {scene}" for scene in OWN_SCENES]
        themes = [Theme("own", *_read_reference(options.reference), prompts)]
    elif options.subject is not None:
        themes = choose_themes(options.seed, [options.subject])
    else:
        themes = choose_themes(options.seed)
    if options.prompt is None:
        return themes
    return [replace(theme, prompts=[options.prompt], subject=None) for theme in themes]


def _read_reference(path: str) -> tuple[Tensor, Tensor | None]:
    """Read an image and put its subject, cut out by its alpha channel, on a white square; its mask, if it has one."""
    image, alpha = read_image(path)
    fill = 1.0 if alpha is None else FILL
    prepared, mask = prepare_reference_image(image, alpha, size=IMAGE_SIZE, fill=fill)
    return prepared, None if alpha is None else mask


def _measured(panels: Sequence[Panel]) -> Iterator[str]:
    """Tell how well the images keep to subject and prompt, where the world knows both."""
    known = [(panel, panel.theme.subject) for panel in panels if panel.theme.subject]
    if known:
        yield f"{'subject match (0 to 1), scene and shape recognised':>52}"
    classifier = load_classifier()
    for panel, subject in known:
        for kind, images in panel.images.items():
            pixels = (images * 255.0).round().byte().numpy()
            match = [measure_match(image, subject).match for image in pixels]
            seen = recognise(pixels, classifier)
            scenes = sum(
                found.background == scene.background
                for found, scene in zip(seen, SCENES_SHOWN, strict=True)
            )
            shapes = sum(found.shape == subject.shape for found in seen)
            yield (
                f"{panel.theme.name:>8}, {kind.replace('_', ' '):<17} {sum(match) / len(match):.2f}   "
                f"{scenes} and {shapes} of {len(seen)}"
            )


def _write(panel: Panel, out: Path, options: DemoOptions) -> None:
    """Write a theme's reference and images, each with the parameters that it was made with."""
    name = panel.theme.name
    save_png(out / f"{name}_reference.png", panel.theme.reference)
    settings = {
        "steps": options.steps,
        "cfg": options.cfg,
        "image_guidance": options.image_guidance,
        "image_range": IMAGE_RANGE,
    }
    for kind, images in panel.images.items():
        for number, (prompt, image) in enumerate(
            zip(panel.theme.prompts, torch.unbind(images), strict=True)
        ):
            values = {**settings, "prompt": prompt, "seed": options.seed + number}
            metadata = {METADATA_KEY: json.dumps(values)}
            save_png(out / f"{name}_{number}_{kind}.png", image[None], metadata)
