"""Build a synthetic training set: captions -> images -> masks of their subjects -> those that are fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...images.files import save_png
from ...pipeline.loading import choose_dtype
from ..order import sample_seed
from ..packing import require_webdataset
from .captions import (
    CONTEXTS_FILE,
    SUBJECTS_FILE,
    Caption,
    captions_digest,
    combine_lists,
    read_captions,
)
from .folder import BuildFolder, Sample, read_rejections
from .options import BuildOptions
from .quality import is_blank, judge_mask
from .segmentation import load_segmenter
from .text_to_image import TextToImage


@dataclass(frozen=True)
class BuildSummary:
    """How a build ended.

    Attributes:
        count: Samples that were asked for.
        rejected: Reason to number of samples.
    """

    count: int
    rejected: Mapping[str, int]

    @property
    def kept(self) -> int:
        """Samples in the set."""
        return self.count - sum(self.rejected.values())

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.count} samples kept"]
        return "\n".join([*lines, *(f"  {n} rejected: {why}" for why, n in self.rejected.items())])


def build(
    options: BuildOptions,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    device: torch.device | None = None,
    has_bar: bool = True,
) -> None:
    """Make this process's part of a set; what is finished already is left as it is.

    Every sample depends on the settings and its number alone, not on processes or interruptions: noise is drawn for
    each sample, and a batch always holds the same samples. What remains are the last bits that a device's matrix
    products do not repeat from process to process.

    Args:
        options: What to build.
        process_index: Of this process, from 0.
        num_processes: How many share the work.
        device: Where the models run; ``None``: the CPU.
        has_bar: Whether to show a progress bar.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do. Nothing was written then.
        OSError: The disk is full; give the same command again once there is room.
    """
    captions = _captions(options)
    has_shards = options.form == "shards"
    if has_shards:
        require_webdataset()
    shard_size = options.shard_size if has_shards else None
    folder = BuildFolder(Path(options.out), shard_size=shard_size, process_index=process_index)
    settings = _settings(options, captions)
    folder.check(settings)
    units = _units(options, captions)[process_index::num_processes]
    maker = _Maker(options, folder, torch.device("cpu") if device is None else device)
    if any(not folder.is_decided(sample) for unit in units for sample in unit):
        maker.load()
    folder.begin(settings)
    total = sum(len(unit) for unit in units)
    with tqdm(total=total, unit="sample", desc="building", disable=not has_bar) as bar:
        for unit in units:
            for batch in _split(unit, options.batch_size):
                maker.make(batch)
                bar.update(len(batch))
            if has_shards:
                folder.pack(unit)


def summarise(options: BuildOptions) -> BuildSummary:
    """Count what all processes kept and rejected, once all have ended; the most frequent reason first."""
    count = _count(options, _captions(options))
    rejections = read_rejections(Path(options.out))
    reasons = Counter(reason for number, reason in rejections.items() if number < count)
    return BuildSummary(count, dict(reasons.most_common()))


class _Maker:
    """Makes samples with models that are loaded on demand."""

    def __init__(self, options: BuildOptions, folder: BuildFolder, device: torch.device) -> None:
        self.options, self.folder, self.device = options, folder, device

    def load(self) -> None:
        options, device = self.options, self.device
        self.segment = load_segmenter(
            options.segmenter_model,
            options.detector_model,
            flag="--segmenter_model",
            mask_threshold=options.mask_threshold,
            box_threshold=options.box_threshold,
            device=device,
        )
        self.text_to_image = TextToImage(
            options.model,
            pipeline_class=options.pipeline_class,
            dtype=choose_dtype(options.dtype, device),
            device=device,
        )

    def make(self, batch: Sequence[Sample]) -> None:
        """Make the undecided samples of a batch.

        All of it is generated, as the size of a batch may change the last bits of its images.
        """
        missing = [index for index, s in enumerate(batch) if not self.folder.is_decided(s)]
        if not missing:
            return
        images = self.text_to_image(
            [sample.caption.text for sample in batch],
            [sample.seed for sample in batch],
            width=self.options.width,
            height=self.options.height,
            guidance_scale=self.options.cfg,
            num_inference_steps=self.options.steps,
            negative_prompt=self.options.negative,
        )
        for index in missing:
            self._decide(batch[index], images[index : index + 1])

    def _decide(self, sample: Sample, image: torch.Tensor) -> None:
        """Keep a sample or reject it."""
        if is_blank(image):
            self._reject(sample, image, "blank image", None)
            return
        mask = self.segment(image, sample.caption.subject)
        verdict = judge_mask(mask, self.options.limits)
        if verdict.reason is None:
            self.folder.save(sample, image, verdict.mask)
        else:
            self._reject(sample, image, verdict.reason, verdict.value, mask)

    def _reject(
        self,
        sample: Sample,
        image: torch.Tensor,
        reason: str,
        value: float | None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Note why a sample is left out, and keep it elsewhere if that is wanted."""
        if self.options.rejected is not None and bool(image.isfinite().all()):
            folder = Path(self.options.rejected)
            folder.mkdir(parents=True, exist_ok=True)
            if mask is not None:
                marked = mask[..., None].to(image).expand(-1, -1, -1, 3)
                image = torch.cat([image, marked], dim=2)  # side by side
            save_png(folder / f"{sample.number:08d} {reason}.png", image)
        self.folder.reject(sample, reason, value)


def _captions(options: BuildOptions) -> list[Caption]:
    if options.captions is not None:
        return read_captions(options.captions)
    lists = options.subjects or SUBJECTS_FILE, options.contexts or CONTEXTS_FILE
    return combine_lists(*lists, seed=options.seed)


def _count(options: BuildOptions, captions: Sequence[Caption]) -> int:
    return len(captions) if options.count is None else options.count


def _units(options: BuildOptions, captions: Sequence[Caption]) -> list[list[Sample]]:
    """Return what is dealt out to the processes: batches, or shards."""
    size = options.shard_size if options.form == "shards" else options.batch_size
    samples = [
        Sample(number, captions[number % len(captions)], sample_seed(options.seed, number))
        for number in range(_count(options, captions))
    ]
    return list(_split(samples, size))


def _split(samples: Sequence[Sample], size: int) -> Iterable[list[Sample]]:
    for start in range(0, len(samples), size):
        yield list(samples[start : start + size])


def _settings(options: BuildOptions, captions: Sequence[Caption]) -> dict[str, Any]:
    """Return what a set depends on; places and speed are left out, models go by their folders' names."""
    left_out = {
        "out",
        "rejected",
        "captions",
        "subjects",
        "contexts",
        "batch_size",
        "cpu",
        "shard_size",
    }
    settings = {key: value for key, value in options.to_dict().items() if key not in left_out}
    for key in ("model", "segmenter_model", "detector_model"):
        settings[key] = settings[key] and Path(settings[key]).resolve().name
    settings["captions_sha256"] = captions_digest(captions)
    if options.form == "shards":
        settings |= {"count": _count(options, captions), "shard_size": options.shard_size}
    else:
        del settings["count"]  # a folder may grow
    return settings
