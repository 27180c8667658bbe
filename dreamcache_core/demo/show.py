"""What ``dreamcache demo`` does: load the model that comes along, draw, and write images and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
from .gallery import Panel, Sampling, Theme, choose_themes, draw_panels, draw_sheet
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
    themes = [_with_prompt(theme, options.prompt) for theme in _themes(options)]
    pipeline = DreamCachePipeline(load_diffusers_pipeline(files.model))
    adapters = load_adapters(files.adapters)
    sampling = Sampling(options.steps, options.cfg, options.image_guidance)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    panels: list[Panel] = []
    for panel in draw_panels(pipeline, adapters, themes, options.seed, sampling):
        panels.append(panel)
        _write(panel, out, options, sampling)
        yield f"{panel.theme.name}: {len(panel.theme.prompts)} images with and without reference"
    save_png(out / SHEET, draw_sheet(panels))
    try:
        yield from _measured(panels)
    except MissingPackageError as error:
        yield f"Not measured: {error}"
    yield f"Look at {out / SHEET}"


def _themes(options: DemoOptions) -> Sequence[Theme]:
    if options.reference is not None:
        shape = options.subject or "ball"
        prompts = [f"{with_article(shape)} {scene}" for scene in OWN_SCENES]
        return [Theme("own", *_read_reference(options.reference), prompts)]
    if options.subject is not None:
        return choose_themes(options.seed, [options.subject])
    return choose_themes(options.seed)


def _with_prompt(theme: Theme, prompt: str | None) -> Theme:
    """Replace a theme's prompts by the user's own, if there is one."""
    return theme if prompt is None else Theme(theme.name, theme.reference, theme.mask, [prompt])


def _read_reference(path: str) -> tuple[Tensor, Tensor | None]:
    """Read an image and put its subject, cut out by its alpha channel, on a white square; its mask, if it has one."""
    image, alpha = read_image(path)
    fill = 1.0 if alpha is None else FILL
    prepared, mask = prepare_reference_image(image, alpha, size=IMAGE_SIZE, fill=fill)
    return prepared, None if alpha is None else mask


def _measured(panels: Sequence[Panel]) -> Iterator[str]:
    """Tell how well the images keep to subject and prompt, where the world knows both."""
    from .measures.classifier import load_classifier, recognise
    from .measures.match import measure_match

    classifier, _ = load_classifier()
    heading = "subject match (0 to 1), scene and shape recognised"
    for panel in panels:
        subject, scenes = panel.theme.subject, panel.theme.scenes
        if subject is None:
            continue
        if heading:
            yield f"{heading:>52}"
            heading = ""
        for kind, images in _kinds(panel).items():
            pixels = (images * 255.0).round().byte().numpy()
            match = [measure_match(image, subject).match for image in pixels]
            seen = recognise(pixels, classifier)
            scenes_seen = [s.background == w.background for s, w in zip(seen, scenes, strict=True)]
            shapes_seen = [s.shape == subject.shape for s in seen]
            yield (
                f"{panel.theme.name:>8}, {kind.replace('_', ' '):<17} {sum(match) / len(match):.2f}   "
                f"{sum(scenes_seen)} and {sum(shapes_seen)} of {len(seen)}"
            )


def _kinds(panel: Panel) -> dict[str, Tensor]:
    return {"with_reference": panel.with_reference, "without_reference": panel.without_reference}


def _write(panel: Panel, out: Path, options: DemoOptions, sampling: Sampling) -> None:
    """Write a theme's reference and images, each with the parameters that it was made with."""
    name = panel.theme.name
    save_png(out / f"{name}_reference.png", panel.theme.reference)
    settings = {
        "steps": sampling.steps,
        "cfg": sampling.guidance_scale,
        "image_guidance": sampling.image_guidance_scale,
        "image_range": sampling.image_range,
    }
    for kind, images in _kinds(panel).items():
        for number, (prompt, image) in enumerate(
            zip(panel.theme.prompts, torch.unbind(images), strict=True)
        ):
            values = {**settings, "prompt": prompt, "seed": options.seed + number}
            metadata = {METADATA_KEY: json.dumps(values)}
            save_png(out / f"{name}_{number}_{kind}.png", image[None], metadata)
