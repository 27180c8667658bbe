"""Images during training: each reference, its prompt without it, and its prompt with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data.sources.opening import open_source
from ..data.sources.source import Pair, PairSource, spread
from ..errors import DreamCacheError, InputError
from ..images.files import save_png
from ..images.reference import prepare_reference_image
from ..images.sheets import contact_sheet
from ..method.adapter import AdapterSet
from ..method.blending import ReferenceUse
from ..pipeline.base_model import BaseModel
from .config import TrainConfig

SEED = 0


class Validation:
    """A fixed set of references and prompts, drawn with fixed seeds; training is not touched by it.

    Args:
        base: The base model.
        config: Settings of the run.
        source: Training set, which serves where the settings name no set of its own.
        resolution: Side of references and images, pixels.

    Raises:
        InputError: There is no set to take references from.
    """

    def __init__(
        self, base: BaseModel, config: TrainConfig, source: PairSource | None, resolution: int
    ) -> None:
        if config.validation_data is not None:
            source = open_source(config.validation_data)
        if source is None:
            raise InputError(
                "The validation needs images, and the training set is given in its precomputed form alone. Give "
                "validation_data (or data), or validate_every = 0."
            )
        self.base, self.config, self.resolution = base, config, resolution
        pairs = list(_readable(source, config.validation_samples))
        if not pairs:
            raise InputError(
                "No sample can be read that a validation grid could show; 'dataset check' says why."
            )
        self.references = [
            prepare_reference_image(pair.subject, pair.mask, size=resolution)[0] for pair in pairs
        ]
        given = config.validation_prompts
        self.prompts = [
            given[row % len(given)] if given else pair.caption for row, pair in enumerate(pairs)
        ]
        self._without: list[Tensor] = []

    @property
    def num_images(self) -> int:
        """Images that the next grid takes; those without the reference are drawn once."""
        return 2 * len(self.references) - len(self._without)

    @torch.no_grad()
    def draw(self, adapters: AdapterSet, after_image: Callable[[], object]) -> Tensor:
        """Draw the grid.

        Args:
            adapters: The adapters as they are now.
            after_image: Called after each image.

        Returns:
            A contact sheet, (1, height, width, 3) in [0, 1]: a row for each reference.
        """
        rows: list[Sequence[Tensor]] = []
        for row, (prompt, image) in enumerate(zip(self.prompts, self.references, strict=True)):
            reference = self.base.pipeline.encode_reference(image, adapters=adapters)
            if row == len(self._without):
                self._without.append(self._sample(prompt, ReferenceUse(reference, adapters, 0.0)))
                after_image()
            with_it = self._sample(prompt, ReferenceUse(reference, adapters))
            after_image()
            rows.append([image, self._without[row], with_it])
        captions = [["reference", f"no reference: {prompt}", "with it"] for prompt in self.prompts]
        return contact_sheet(rows, captions)

    def save(
        self, adapters: AdapterSet, folder: Path, step: int, after_image: Callable[[], object]
    ) -> Tensor:
        """Draw the grid and write it as ``step-000500.png``; see ``draw``."""
        sheet = self.draw(adapters, after_image)
        folder.mkdir(parents=True, exist_ok=True)
        save_png(folder / f"step-{step:06d}.png", sheet)
        return sheet

    def _sample(self, prompt: str, use: ReferenceUse) -> Tensor:
        image = self.base.pipeline(
            prompt,
            use,
            guidance_scale=self.config.validation_cfg,
            image_guidance_scale=self.config.validation_image_guidance,
            num_inference_steps=self.config.validation_steps,
            generator=torch.Generator().manual_seed(SEED),
            height=self.resolution,
            width=self.resolution,
            output_type="pt",
        )
        return image.permute(0, 2, 3, 1).float().cpu()


def _readable(source: PairSource, count: int) -> Iterator[Pair]:
    """Yield so many different pairs, those that can be read."""
    for index in spread(source, count):
        try:
            yield source.read(index)
        except DreamCacheError:
            continue
