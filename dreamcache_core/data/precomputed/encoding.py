"""``dreamcache dataset encode``: run VAE and text encoders over a training set once, instead of at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ...config import Config, check_range
from ...errors import DreamCacheError, InputError
from ...files.whole_files import whole_file
from ...images.reference import check_placement
from ...pipeline.base_model import MAX_CHECKED_CAPTIONS, BaseModel
from ...pipeline.fingerprint import ENCODER_PARTS, model_fingerprint
from ...pipeline.loading import DTYPES, require_diffusers
from ...processes import join, require_shared_folder
from ..augmentation import ALL_ALTERATIONS, NO_ALTERATIONS, Alterations, augment_reference
from ..buckets import crop_target, target_sizes
from ..order import sample_seed
from ..sources.opening import open_source
from ..sources.source import Pair, PairSource, fingerprint
from .encoded import (
    COMPARED,
    INDEX_FILE,
    EncodedIndex,
    require_same_set,
    shard_metadata,
    shard_name,
    split_metadata,
)

UNFINISHED_FILE = "index.unfinished.json"


@dataclass(frozen=True)
class EncodeOptions(Config):
    """Compute the latents and text states of a training set once.

    Attributes:
        data: Training set: folder, manifest, shards or parquet.
        model: Base model: diffusers folder or single-file checkpoint.
        out: Folder for the shards.
        caption: Caption of images that have none.
        model_config: For a single file not of Stable Diffusion 1.x or SDXL: a diffusers folder like it.
        resolution: Side of the images in pixels; else the model's.
        buckets: Keep the targets' aspect: buckets of equal area.
        reference_variants: Augmented references per image; 0: augmented and encoded in training.
        keep_reference: References are never mirrored, recoloured or partly erased: for lettering and exact colours.
        batch_size: Images encoded at a time.
        samples_per_shard: Images in a file.
        dtype: Float type of the files.
        seed: Seed of the augmentation.
    """

    data: str
    model: str
    out: str
    caption: str | None = None
    model_config: str | None = None
    resolution: int | None = None
    buckets: bool = False
    reference_variants: int = 0
    keep_reference: bool = False
    batch_size: int = 8
    samples_per_shard: int = 1000
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: One is out of range.
        """
        lowest = {"reference_variants": 0, "batch_size": 1, "samples_per_shard": 1, "seed": 0}
        for name, low in lowest.items():
            check_range(name, getattr(self, name), low)
        if self.resolution is not None:
            check_placement(self.resolution, 1.0)

    @property
    def alterations(self) -> Alterations:
        """What may happen to references."""
        return NO_ALTERATIONS if self.keep_reference else ALL_ALTERATIONS


def encode_dataset(options: EncodeOptions) -> Path:
    """Encode a set into its folder; several processes share the shards, and what was cut off goes on where it stopped.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
    """
    require_diffusers()
    with join("train") as state:
        source = open_source(options.data, options.caption)
        base = BaseModel(options.model, options.model_config, torch.float32)
        index = _index(options, source, base)
        base.warn_about_long_captions(index.captions[:MAX_CHECKED_CAPTIONS])
        folder = Path(options.out)
        require_shared_folder(folder, state)
        if state.is_main_process:
            _begin(folder, index)
        state.wait_for_everyone()
        base.to(state.device)
        shards = range(math.ceil(len(index.sizes) / options.samples_per_shard))
        mine = shards[state.process_index :: state.num_processes]
        total = sum(len(index.indices(shard)) for shard in mine)
        is_quiet = not state.is_main_process
        with tqdm(total=total, unit="pair", desc="encoding", disable=is_quiet) as bar:
            encoder = _Encoder(options, source, base, index, bar)
            for shard in mine:
                encoder.write(folder / shard_name(shard), shard)
        state.wait_for_everyone()
        if state.is_main_process:
            (folder / UNFINISHED_FILE).replace(folder / INDEX_FILE)
        state.wait_for_everyone()
    return folder


def _index(options: EncodeOptions, source: PairSource, base: BaseModel) -> EncodedIndex:
    resolution = options.resolution or min(base.pipeline.default_size_px)
    sizes = target_sizes(source, resolution, has_buckets=options.buckets)
    return EncodedIndex(
        keys=list(source.keys),
        sizes=sizes,
        captions=[source.caption(i) for i in range(len(sizes))],
        samples_per_shard=options.samples_per_shard,
        num_variants=options.reference_variants,
        has_pooled=base.pipeline.is_sdxl,
        resolution=resolution,
        data_fingerprint=fingerprint(source),
        model_fingerprint=model_fingerprint(options.model, ENCODER_PARTS),
        dtype=options.dtype,
        seed=options.seed,
        reference_flip=options.alterations.flip,
        reference_jitter=options.alterations.jitter,
        reference_erase=options.alterations.erase,
    )


def _begin(folder: Path, index: EncodedIndex) -> None:
    """Make the folder, or check that what lies in it is of the same set."""
    folder.mkdir(parents=True, exist_ok=True)
    finished, unfinished = folder / INDEX_FILE, folder / UNFINISHED_FILE
    for file in (finished, unfinished):
        if file.exists():
            wanted = {name: getattr(index, name) for name in COMPARED}
            require_same_set(EncodedIndex.load(file), wanted)
    index.save(unfinished)
    finished.unlink(missing_ok=True)


class _Encoder:
    """Turns pairs into the tensors of a shard."""

    def __init__(
        self,
        options: EncodeOptions,
        source: PairSource,
        base: BaseModel,
        index: EncodedIndex,
        bar: tqdm[Any],
    ) -> None:
        self.options, self.source, self.base, self.index = options, source, base, index
        self.bar = bar

    def write(self, path: Path, shard: int) -> None:
        """Write a shard, all or nothing; one of the same set that exists is left."""
        indices = self.index.indices(shard)
        if self._is_written(path):
            self.bar.update(len(indices))
            return
        tensors: dict[str, Tensor] = {}
        for start in range(0, len(indices), self.options.batch_size):
            batch = indices[start : start + self.options.batch_size]
            tensors |= self._encode(batch)
            self.bar.update(len(batch))
        try:
            with whole_file(path) as temporary:
                # save_file's are their owner's alone
                temporary.write_bytes(save(tensors, shard_metadata(tensors, self.index)))
        except OSError as error:
            raise InputError(
                f"Cannot write {path}: {error}. Make room and start the command again: it goes on where it stopped."
            ) from error

    def _is_written(self, path: Path) -> bool:
        try:
            with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
                return split_metadata(file.metadata())[0] == self.index.identity
        except (OSError, SafetensorError):
            return False

    def _encode(self, indices: range) -> dict[str, Tensor]:
        """Encode some pairs -> tensors by key."""
        pairs = [self._read(index) for index in indices]
        text = self.base.encode_text([pair.caption for pair in pairs])
        tensors: dict[str, Tensor] = {}
        images: dict[str, Tensor] = {}
        num_variants = self.options.reference_variants
        for row, (index, pair) in enumerate(zip(indices, pairs, strict=True)):
            tensors[f"{index}.text_states"] = text.states[row]
            if text.pooled is not None:
                tensors[f"{index}.text_pooled"] = text.pooled[row]
            images[f"{index}.target_latent"] = crop_target(pair.target, *self.index.sizes[index])
            for variant in range(num_variants):
                seed = sample_seed(self.options.seed, index * num_variants + variant)
                images[f"{index}.reference_latent.{variant}"] = augment_reference(
                    pair.subject,
                    pair.mask,
                    size=self.index.resolution,
                    generator=torch.Generator().manual_seed(seed),
                    alterations=self.options.alterations,
                )
        tensors |= self._latents(images)
        dtype = DTYPES[self.options.dtype]
        return {key: tensor.to("cpu", dtype).contiguous() for key, tensor in tensors.items()}

    def _latents(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode images by key, as many of one size together as a batch holds."""
        latents: dict[str, Tensor] = {}
        for size in {image.shape for image in images.values()}:
            keys = [key for key, image in images.items() if image.shape == size]
            for start in range(0, len(keys), self.options.batch_size):
                some = keys[start : start + self.options.batch_size]
                encoded = self.base.encode_images(torch.cat([images[key] for key in some]))
                latents |= dict(zip(some, encoded, strict=True))
        return latents

    def _read(self, index: int) -> Pair:
        try:
            return self.source.read(index)
        except DreamCacheError as error:
            raise InputError(
                f"Sample {index} ({', '.join(self.source.files(index))}) cannot be encoded: {error} Find all such "
                "samples with 'dataset check'."
            ) from error
