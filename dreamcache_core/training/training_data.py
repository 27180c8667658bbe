"""Open what a run reads, and put it in the run's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from ..data.buckets import target_sizes
from ..data.order import SampleOrder
from ..data.precomputed.encoded import ALTERATION_FIELDS, EncodedSet, require_same_set
from ..data.sources.opening import open_source
from ..data.sources.source import PairSource, fingerprint
from ..errors import InputError
from ..pipeline.base_model import ENCODER_PARTS, MAX_CHECKED_CAPTIONS, BaseModel, model_fingerprint
from .config import TrainConfig
from .interruption import leave_signals_to_parent
from .samples import SampleSettings, TrainingSet, collate


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The set of a run.

    Attributes:
        source: Pairs on disk, or ``None``.
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

    def names(self, indices: Sequence[int]) -> list[str]:
        """First file of each sample, or its key where there are no files, for messages."""
        names: list[str] = []
        for index in indices:
            if self.source is not None:
                names.append(self.source.files(index)[0])
            elif self.encoded is not None:
                names.append(self.encoded.index.keys[index])
        return names

    def loader(
        self, config: TrainConfig, first: int, global_batch: int, channels: int
    ) -> DataLoader[dict[str, object]]:
        """Make the loader of a run; it ends with the last step.

        Args:
            config: Settings of the run.
            first: Position in the run of the first sample.
            global_batch: Samples of one optimizer step over all processes.
            channels: Channels of the latents.

        Returns:
            The loader over the samples of all processes.
        """
        numbers = {size: number for number, size in enumerate(dict.fromkeys(self.sizes))}
        buckets = [numbers[size] for size in self.sizes] if len(numbers) > 1 else None
        order = SampleOrder(len(self), config.seed, buckets=buckets, group=global_batch)
        settings = SampleSettings(
            self.resolution,
            self.sizes,
            config.caption_dropout,
            config.seed,
            channels,
            config.alterations,
        )
        samples = TrainingSet(
            self.source, self.encoded, order, settings, first, config.steps * global_batch
        )
        return DataLoader(
            samples,
            batch_size=config.batch_size,
            shuffle=False,
            num_workers=config.workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_parent,
            pin_memory=torch.cuda.is_available(),
        )


def open_training_data(config: TrainConfig, base: BaseModel) -> TrainingData:
    """Open the set of a run and check it against the base model.

    Args:
        config: Settings of the run.
        base: The base model.

    Returns:
        The set.

    Raises:
        DreamCacheError: The set is missing, empty, or was precomputed for something else.
    """
    resolution = config.resolution or min(base.pipeline.default_size_px)
    source = None if config.data is None else open_source(config.data)
    if config.encoded is None:
        assert source is not None
        sizes = target_sizes(source, resolution, has_buckets=config.buckets)
        base.warn_about_long_captions(
            [source.caption(i) for i in range(min(len(source.keys), MAX_CHECKED_CAPTIONS))]
        )
        return TrainingData(source, None, sizes, fingerprint(source), resolution)
    encoded = EncodedSet(config.encoded)
    _check_encoded(encoded, source, resolution, config)
    base.warn_about_long_captions(encoded.index.captions[:MAX_CHECKED_CAPTIONS])
    sizes = encoded.index.sizes
    return TrainingData(source, encoded, sizes, encoded.index.data_fingerprint, resolution)


def _check_encoded(
    encoded: EncodedSet, source: PairSource | None, resolution: int, config: TrainConfig
) -> None:
    wanted: dict[str, object] = {
        "resolution": resolution,
        "model_fingerprint": model_fingerprint(config.model, ENCODER_PARTS),
    }
    if source is not None:
        wanted["data_fingerprint"] = fingerprint(source)
    if encoded.num_variants:
        # what is left as it is may differ: the set decides
        wanted |= {name: False for name in ALTERATION_FIELDS if not getattr(config, name)}
    require_same_set(encoded.index, wanted)
    if not encoded.num_variants and source is None:
        raise InputError(
            f"{encoded.folder} holds no references (it was made with reference_variants = 0), so their images are "
            "needed: give data as well."
        )
