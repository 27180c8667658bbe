"""What a training run reads: position by position, everything random drawn from the position's own seed.

Source: METHOD.md section 7. A run with another number of workers or processes reads the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..data.augmentation import augment_reference
from ..data.buckets import crop_target, target_sizes
from ..data.order import SampleOrder, sample_seed
from ..data.precomputed.encoded import ALTERATION_FIELDS, EncodedSet, require_same_set
from ..data.sources.opening import open_source
from ..data.sources.source import PairSource, fingerprint
from ..errors import DreamCacheError, InputError
from ..fitting.noise_schedule import NUM_TIMESTEPS
from ..method.cache import LATENT_FACTOR
from ..pipeline.base_model import MAX_CHECKED_CAPTIONS, BaseModel
from ..pipeline.fingerprint import ENCODER_PARTS, model_fingerprint
from ..processes import ignore_signals
from .config import TrainConfig

FAILURE = "failure"
"""Key of a sample that could not be read, nor another in its place; its value says why."""

SKIPPED = "skipped"
"""Key of what is said of a sample that could not be read, and whose place another took; mostly empty."""

MAX_TRIED = 16
"""Samples that are tried at one position."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The set of a run.

    Attributes:
        source: Pairs on disk, or ``None`` where ``encoded`` holds everything.
        encoded: Their precomputed form, or ``None``.
        sizes: Height and width of every sample's target, pixels.
        fingerprint: Identity of the set.
        resolution: Side of the reference square, pixels.
    """

    source: PairSource | None
    encoded: EncodedSet | None
    sizes: Sequence[tuple[int, int]]
    fingerprint: str
    resolution: int

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.sizes)

    def files(self, index: int) -> tuple[str, ...]:
        """Files of a sample, or its key where there are none, for messages."""
        if self.source is not None:
            return self.source.files(index)
        assert self.encoded is not None
        return (self.encoded.index.keys[index],)

    def loader(
        self, config: TrainConfig, first: int, global_batch: int, channels: int
    ) -> DataLoader[dict[str, object]]:
        """Make the loader over the samples of all processes; it ends with the last step.

        Args:
            config: Settings of the run.
            first: Position in the run of the first sample.
            global_batch: Samples of one optimizer step over all processes.
            channels: Channels of the latents.
        """
        numbers = {size: number for number, size in enumerate(dict.fromkeys(self.sizes))}
        buckets = [numbers[size] for size in self.sizes] if len(numbers) > 1 else None
        order = SampleOrder(len(self), config.seed, buckets=buckets, group=global_batch)
        positions = range(first, config.steps * global_batch)
        return DataLoader(
            TrainingSet(self, config, order, positions, channels),
            batch_size=config.batch_size,
            shuffle=False,
            num_workers=config.workers,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available(),
        )


class TrainingSet(Dataset[dict[str, Any]]):
    """The samples of a run from one position to another.

    Args:
        data: The set.
        config: Settings of the run.
        order: Which pair stands at which position.
        positions: Positions that are read.
        channels: Channels of the latents.
    """

    def __init__(
        self,
        data: TrainingData,
        config: TrainConfig,
        order: SampleOrder,
        positions: range,
        channels: int,
    ) -> None:
        self.data, self.config, self.order = data, config, order
        self.positions, self.channels = positions, channels

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.positions)

    def __getitem__(self, offset: int) -> dict[str, Any]:
        """Read one sample.

        Args:
            offset: Which of the positions.

        Returns:
            ``index`` of the pair; ``timestep``; ``noise`` and ``reference_noise`` (channels, height / 8, width / 8);
            ``is_dropped``: whether the caption counts as empty. Then ``target`` (height, width, 3) in [0, 1] and
            ``caption``, or their precomputed form ``target_latent``, ``text_states`` and for SDXL ``text_pooled``;
            and ``reference`` (resolution, resolution, 3) or ``reference_latent``; and ``skipped``: where the pair cannot
            be read and the next one of its size takes its place, a message that names its files. Where none of those
            can be read either, ``failure`` alone, the same message (an exception would come out of a reading process
            as the text of a traceback).
        """
        position = self.positions[offset]
        epoch, first = self.order(position)
        message = ""
        for index in self._candidates(first):
            generator = torch.Generator().manual_seed(sample_seed(self.config.seed, position))
            sample = self._draw(index, generator)
            try:
                return sample | self._read(index, epoch, generator) | {SKIPPED: message}
            except DreamCacheError as error:
                files = ", ".join(self.data.files(index))
                message = message or f"{files} cannot be used: {error}"
        return {FAILURE: f"{message} Find all such samples with 'dataset check'."}

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield a pair and those that may take its place: of a precomputed set, which was whole once, none."""
        yield index
        if self.data.encoded is not None:
            return
        sizes, tried = self.data.sizes, {self.data.files(index)}
        for step in range(1, len(sizes)):
            other = (index + step) % len(sizes)
            if sizes[other] != sizes[index] or self.data.files(other) in tried:
                continue
            if len(tried) == MAX_TRIED:
                return
            tried.add(self.data.files(other))
            yield other

    def _draw(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        height, width = (side // LATENT_FACTOR for side in self.data.sizes[index])
        side = self.data.resolution // LATENT_FACTOR
        return {
            "index": index,
            "timestep": torch.randint(
                self.config.min_timestep, NUM_TIMESTEPS, (), generator=generator
            ),
            "is_dropped": torch.rand((), generator=generator) < self.config.caption_dropout,
            "noise": torch.randn((self.channels, height, width), generator=generator),
            "reference_noise": torch.randn((self.channels, side, side), generator=generator),
        }

    def _read(self, index: int, epoch: int, generator: torch.Generator) -> dict[str, Tensor | str]:
        sample: dict[str, Tensor | str] = {}
        source, encoded = self.data.source, self.data.encoded
        if encoded is not None:
            sample |= encoded.read_target(index)
            if encoded.index.num_variants:
                return sample | encoded.read_reference(index, epoch)
        assert source is not None
        pair = source.read(index)
        if encoded is None:
            target = crop_target(pair.target, *self.data.sizes[index])
            sample |= {"target": target[0], "caption": pair.caption}
        reference = augment_reference(
            pair.subject,
            pair.mask,
            size=self.data.resolution,
            generator=generator,
            alterations=self.config.alterations,
        )
        return sample | {"reference": reference[0]}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples: tensors along a new first axis, captions as a list; of failures the first alone."""
    failed = [sample for sample in samples if FAILURE in sample]
    return failed[0] if failed else default_collate(samples)


def open_training_data(config: TrainConfig, base: BaseModel) -> TrainingData:
    """Open the set of a run and check it against the base model.

    Raises:
        DreamCacheError: The set is missing, empty, or was precomputed for something else.
    """
    resolution = config.resolution or min(base.pipeline.default_size_px)
    source = None if config.data is None else open_source(config.data, config.caption)
    if config.encoded is None:
        assert source is not None
        sizes = target_sizes(source, resolution, has_buckets=config.buckets)
        base.warn_about_long_captions(
            [source.caption(i) for i in range(min(len(source.keys), MAX_CHECKED_CAPTIONS))]
        )
        return TrainingData(source, None, sizes, fingerprint(source), resolution)
    encoded = EncodedSet(config.encoded)
    index = encoded.index
    wanted: dict[str, object] = {
        "resolution": resolution,
        "model_fingerprint": model_fingerprint(config.model, ENCODER_PARTS),
    }
    if source is not None:
        wanted["data_fingerprint"] = fingerprint(source)
    if index.num_variants and config.keep_reference:
        wanted |= dict.fromkeys(ALTERATION_FIELDS, False)
    require_same_set(index, wanted)
    if not index.num_variants and source is None:
        raise InputError(
            f"{encoded.folder} holds no references (it was made with reference_variants = 0), so their images are "
            "needed: give data as well."
        )
    base.warn_about_long_captions(index.captions[:MAX_CHECKED_CAPTIONS])
    return TrainingData(source, encoded, index.sizes, index.data_fingerprint, resolution)
