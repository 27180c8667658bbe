"""Generate the images of DreamBench: one reference for a subject, every prompt, several images each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...data.order import sample_seed
from ...errors import InputError
from ...files.texts import parse_json
from ...images.files import open_image, save_png
from ...images.reference_files import prepare_references, read_references
from ...method.blending import ReferenceUse
from ...pipeline.generate import (
    METADATA_KEY,
    GenerateOptions,
    open_pipeline,
    sample_image,
    versions,
)
from .dataset import Item
from .options import DreamBenchOptions

MAX_PROMPTS = MAX_REPEATS = 1000
"""Room for each subject's and each prompt's numbers, so that a seed does not depend on how many there are."""


def generate_images(
    options: DreamBenchOptions, items: Sequence[Item], *, device: torch.device, has_bar: bool
) -> None:
    """Generate the images that are not there yet, each from a seed of its own.

    Args:
        options: What to do; the images go to ``options.image_folder``.
        items: Images of this process; those of one subject follow one another.
        device: Where they are made.
        has_bar: Whether to show progress.

    Raises:
        DreamCacheError: Bad input, or an image that is there was made with other settings.
        OSError: The disk is full; give the same command again once there is room.
    """
    missing = [item for item in items if not _is_made(options, item)]
    if not missing:
        return
    maker = _Maker(options, _settings(options, missing[0], device))
    total = len(missing) * options.steps
    with tqdm(total=total, unit="step", desc="sampling", disable=not has_bar) as bar:
        for _, group in groupby(missing, key=lambda item: item.subject.number):
            maker.make(list(group), device, bar)


class _Maker:
    """A loaded model with adapters."""

    def __init__(self, options: DreamBenchOptions, first: GenerateOptions) -> None:
        self.options = options
        self.pipeline = open_pipeline(first)
        self.size = first.size or min(self.pipeline.default_size_px)

    def make(self, items: Sequence[Item], device: torch.device, bar: Any) -> None:
        """Make images of one subject."""
        settings = [_settings(self.options, item, device) for item in items]
        use = self._use(settings[0])
        for item, one in zip(items, settings, strict=True):
            image = sample_image(self.pipeline, use, one, one.seed, self.size, bar)
            path = self.options.image_folder / item.name
            path.parent.mkdir(parents=True, exist_ok=True)
            parameters = one.parameters(self.size, versions())
            save_png(path, image, {METADATA_KEY: json.dumps(parameters)})

    def _use(self, settings: GenerateOptions) -> ReferenceUse:
        """Encode a subject's reference, once for all its images."""
        references = read_references(settings.reference, settings.mask)
        prepared = prepare_references(references, size=self.size, fill=settings.fill)
        return self.pipeline.use_reference(prepared, settings.scale)


def _settings(options: DreamBenchOptions, item: Item, device: torch.device) -> GenerateOptions:
    reference = item.subject.reference
    number = item.subject.number * MAX_PROMPTS + item.prompt_number
    return options.generation(
        reference=str(reference.image),
        mask=None if reference.mask is None else str(reference.mask),
        prompt=item.prompt,
        seed=sample_seed(options.seed, number * MAX_REPEATS + item.repeat),
        device=str(device),
    )


def _is_made(options: DreamBenchOptions, item: Item) -> bool:
    """Tell whether an image is there; refuse one that was made otherwise."""
    path = options.image_folder / item.name
    if not path.exists():
        return False
    wanted = _settings(options, item, torch.device("cpu")).parameters(0, {})
    if options.size is None:
        del wanted["size"]
    else:
        wanted["size"] = options.size
    for key in ("device", "versions"):  # neither says what is shown
        del wanted[key]
    made = _made_with(path)
    other = sorted(k for k, v in wanted.items() if made.get(k) != json.loads(json.dumps(v)))
    if other:
        raise InputError(
            f"Expected {path} to be made with these settings; it was made with another {', '.join(other)}. Give another "
            "--out, or judge what is there with --images."
        )
    return True


def _made_with(path: Path) -> dict[str, Any]:
    with open_image(path) as image:
        text = image.info.get(METADATA_KEY, "{}")
    try:
        return dict(parse_json(text))
    except (ValueError, TypeError):
        return {}
