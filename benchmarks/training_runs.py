"""What ``training`` compares: one trainer of the product on three kinds of batches, and the plain loop beside it.

All share one frozen base model, so that it is in memory once.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from dreamcache_core.data.precomputed.encoding import EncodeOptions, encode_dataset
from dreamcache_core.processes import Interruption
from dreamcache_core.training.config import TrainConfig
from dreamcache_core.training.dataset import open_training_data
from dreamcache_core.training.loop import Loop
from dreamcache_core.training.run import DTYPES, open_run

from .models import SIZES, write_model
from .textbook import TextbookLoop
from .timing import Stopwatch

PLAIN = "plain loop"
IMAGES = "trainer, images"
TARGETS = "trainer, targets precomputed"
PRECOMPUTED = "trainer, all precomputed"

NUM_BATCHES = 2
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Settings:
    """One benchmark run.

    Attributes:
        size: Name of a size of the base model.
        batch: Images per step.
        steps: Timed steps of each loop.
        dtype: Float type of base model and computation; the adapters stay in float32.
        resolution: Side of the images, pixels.
    """

    size: str
    batch: int
    steps: int
    dtype: str
    resolution: int


class Runs:
    """The loops, ready to step.

    Args:
        settings: What to run.
        folder: An empty folder for the model, the training set and the run.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        config = _write_inputs(settings, folder)
        self.trainer = open_run(config)
        self.loop = Loop(self.trainer, Interruption())
        self.device = self.trainer.accelerator.device
        dtype = DTYPES[config.mixed_precision]
        self.plain = TextbookLoop(self.trainer.base.pipeline.pipeline, dtype)
        self.batches, self.reading_s = self._read()

    def _read(self) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
        """Read all batches in advance -> batches by name, and the seconds that one took to read."""
        trainer = self.trainer
        config = replace(trainer.config, encoded=None)
        data = open_training_data(config, trainer.base)
        loader: DataLoader[Any] = data.loader(config, 0, trainer.global_batch, 4)
        start = time.perf_counter()
        images = list(trainer.accelerator.prepare(loader))
        middle = time.perf_counter()
        encoded = list(self.loop.loader)
        end = time.perf_counter()
        targets = [
            {k: v for k, v in latents.items() if k != "reference_latent"}
            | {"reference": batch["reference"]}
            for latents, batch in zip(encoded, images, strict=True)
        ]
        batches = {PLAIN: images, IMAGES: images, TARGETS: targets, PRECOMPUTED: encoded}
        reading_s = {
            IMAGES: (middle - start) / NUM_BATCHES,
            PRECOMPUTED: (end - middle) / NUM_BATCHES,
        }
        return batches, reading_s

    def steps(self) -> dict[str, Callable[[], None]]:
        """One training step by name; in the same round all of them take the same samples."""
        return {name: self._step(name) for name in self.batches}

    def _step(self, name: str) -> Callable[[], None]:
        batches = itertools.cycle(self.batches[name])
        take = self.plain.step if name == PLAIN else self._train
        return lambda: take(next(batches))

    def _train(self, batch: Mapping[str, Any]) -> None:
        """What ``Loop.train`` does with a batch, less the progress bar."""
        self.loop.take(batch)
        self.loop.finish_step()

    @contextmanager
    def watching(self, name: str, stopwatch: Stopwatch) -> Iterator[None]:
        """Count the phases of a loop's steps while the context is open."""
        loop, base, module = self.loop, self.trainer.base, self.trainer.module
        owners = (base, base, module, loop, loop.accelerator)
        if name == PLAIN:
            owners = (self.plain,) * 5
        methods = {
            "encode_images": "VAE",
            "encode_text": "text",
            "capture": "reference",
            "loss": "forward",
            "backward": "backward",
        }
        with ExitStack() as stack:
            for owner, (method, phase) in zip(owners, methods.items(), strict=True):
                stack.enter_context(stopwatch.watching(owner, method, phase))
            yield


def _write_inputs(settings: Settings, folder: Path) -> TrainConfig:
    model = write_model(folder / "model", SIZES[settings.size])
    data = write_images(folder / "data", settings.batch * NUM_BATCHES, settings.resolution)
    options = EncodeOptions(
        data=str(data),
        model=str(model),
        out=str(folder / "encoded"),
        resolution=settings.resolution,
        reference_variants=1,
        batch_size=1,
    )
    encoded = encode_dataset(options)
    gc.collect()  # the encoder's copy of the base model
    return TrainConfig(
        model=str(model),
        data=str(data),
        encoded=str(encoded),
        out=str(folder / "run"),
        init="identity",
        timestep=1,
        resolution=settings.resolution,
        batch_size=settings.batch,
        steps=NUM_BATCHES,
        mixed_precision=MIXED_PRECISION[settings.dtype],  # pyright: ignore[reportArgumentType]
        workers=0,
        checkpoint_every=0,
        validate_every=0,
        tracker="none",
    )


def write_images(folder: Path, count: int, side: int) -> Path:
    """Write a training set in the authors' layout: a disc on grey, its mask, a caption.

    Args:
        folder: The folder to make.
        count: Number of images.
        side: Their height and width, pixels.

    Returns:
        ``folder``.
    """
    subject = folder / "subject"
    subject.mkdir(parents=True)
    for index in range(count):
        box = (side // 5, side // 4, side // 5 + side // 2, side // 4 + side // 3 + index)
        for kind, mode, ground, fill in (
            ("generation", "RGB", (90, 90, 100), (200, 40, 20 * index % 256)),
            ("mask", "L", 0, 255),
        ):
            image = Image.new(mode, (side, side), ground)
            ImageDraw.Draw(image).ellipse(box, fill=fill)
            image.save(subject / f"{index:03d}_{kind}.png")
        (subject / f"{index:03d}_caption.txt").write_text("a b c", encoding="utf-8")
    return folder
