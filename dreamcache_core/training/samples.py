"""What a training run reads: position by position, everything random drawn from the position's own seed.

Source: METHOD.md section 7. A run with another number of workers or processes reads the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..data.augmentation import ALL_ALTERATIONS, Alterations, augment_reference
from ..data.buckets import crop_target
from ..data.order import SampleOrder, sample_seed
from ..data.precomputed.encoded import EncodedSet
from ..data.sources.source import PairSource
from ..errors import DreamCacheError
from ..pipeline.latents import LATENT_FACTOR
from .objective import NUM_TIMESTEPS


@dataclass(frozen=True)
class SampleSettings:
    """How samples are drawn.

    Attributes:
        resolution: Side of the reference square, pixels.
        sizes: Height and width of every sample's target, pixels.
        caption_dropout: Share of samples whose caption becomes empty.
        seed: Seed of the run.
        latent_channels: Channels of the VAE's latents.
        alterations: What may happen to references.
    """

    resolution: int
    sizes: Sequence[tuple[int, int]]
    caption_dropout: float
    seed: int
    latent_channels: int = 4
    alterations: Alterations = ALL_ALTERATIONS


FAILURE = "failure"
"""Key of a sample that could not be read; its value says why."""


class TrainingSet(Dataset[dict[str, Any]]):
    """The samples of a run from one position to another.

    Args:
        source: Pairs on disk; may be ``None`` where ``encoded`` holds everything.
        encoded: Their precomputed form, or ``None``.
        order: Which pair stands at which position.
        settings: How samples are drawn.
        first: First position of the run that is read.
        last: Position after the last.
    """

    def __init__(
        self,
        source: PairSource | None,
        encoded: EncodedSet | None,
        order: SampleOrder,
        settings: SampleSettings,
        first: int,
        last: int,
    ) -> None:
        self.source, self.encoded, self.order, self.settings = source, encoded, order, settings
        self.first, self.last = first, last

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.last - self.first

    def __getitem__(self, offset: int) -> dict[str, Any]:
        """Read one sample.

        Args:
            offset: Position, counted from ``first``.

        Returns:
            ``index`` of the pair; ``timestep``; ``noise`` and ``reference_noise`` (channels, height / 8, width / 8);
            ``is_dropped``: whether the caption counts as empty. Then ``target`` (height, width, 3) in [0, 1] and
            ``caption``, or their precomputed form ``target_latent``, ``text_states`` and for SDXL ``text_pooled``;
            and ``reference`` (resolution, resolution, 3) or ``reference_latent``. Of a pair that cannot be read the
            entry ``failure`` alone: a message that names its files (an exception would come out of a reading process
            as the text of a traceback).
        """
        position = self.first + offset
        epoch, index = self.order(position)
        generator = torch.Generator().manual_seed(sample_seed(self.settings.seed, position))
        sample = self._draw(index, generator)
        try:
            return sample | self._read(index, epoch, generator)
        except DreamCacheError as error:
            files = () if self.source is None else self.source.files(index)
            return {
                FAILURE: f"Training sample {index} ({', '.join(files)}) cannot be used: {error} Find all such samples "
                "with 'dataset check'."
            }

    def _draw(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        settings = self.settings
        height, width = (side // LATENT_FACTOR for side in settings.sizes[index])
        side, channels = settings.resolution // LATENT_FACTOR, settings.latent_channels
        timestep = torch.randint(NUM_TIMESTEPS, (), generator=generator)
        return {
            "index": index,
            "timestep": timestep,
            "is_dropped": torch.rand((), generator=generator) < settings.caption_dropout,
            "noise": torch.randn((channels, height, width), generator=generator),
            "reference_noise": torch.randn((channels, side, side), generator=generator),
        }

    def _read(self, index: int, epoch: int, generator: torch.Generator) -> dict[str, Tensor | str]:
        sample: dict[str, Tensor | str] = {}
        if self.encoded is not None:
            sample |= self.encoded.read_target(index)
            if self.encoded.num_variants:
                return sample | self.encoded.read_reference(index, epoch)
        assert self.source is not None
        pair = self.source.read(index)
        if self.encoded is None:
            target = crop_target(pair.target, *self.settings.sizes[index])
            sample |= {"target": target[0], "caption": pair.caption}
        reference = augment_reference(
            pair.subject,
            pair.mask,
            size=self.settings.resolution,
            generator=generator,
            alterations=self.settings.alterations,
        )
        return sample | {"reference": reference[0]}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples: tensors along a new first axis, captions as a list; of failures the first alone."""
    failed = [sample for sample in samples if FAILURE in sample]
    return failed[0] if failed else default_collate(samples)
