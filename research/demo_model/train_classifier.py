"""Trains the classifier of the demo world on true renders, roughened as a small latent diffusion model would."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.config import Config
from dreamcache_core.demo.measures.classifier import (
    BACKGROUND_NAMES,
    FORMAT,
    INPUT_SIZE,
    SHAPE_NAMES,
    SceneClassifier,
    load_classifier,
    shrink,
)
from dreamcache_core.demo.world.world import draw_pose, draw_scene, draw_subject, render
from dreamcache_core.files.tensor_file import write_tensor_file

logger = logging.getLogger(__name__)

MAX_SHIFT_PX = 3
HELD_OUT_STREAM = 1
MEASURED_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Config):
    """Train the classifier of backgrounds and shapes in the demo world on true renders.

    Attributes:
        out: The file to write (.safetensors).
        images: Images to draw and train on.
        held_out: Other images to measure on.
        steps: Training steps.
        batch: Images in a step.
        learning_rate: Highest learning rate.
        seed: Decides images, weights and batches.
    """

    out: str
    images: int = 20_000
    held_out: int = 2_000
    steps: int = 3_000
    batch: int = 64
    learning_rate: float = 4e-3
    seed: int = 0


@dataclass(frozen=True)
class LabelledImages:
    """True renders with what they show.

    Attributes:
        images: 8-bit RGB, (count, 3, 64, 64).
        backgrounds: Index into ``BACKGROUND_NAMES`` of each, (count,), int64.
        shapes: Index into ``SHAPE_NAMES`` of each, (count,), int64.
    """

    images: Tensor
    backgrounds: Tensor
    shapes: Tensor


def draw_labelled(count: int, seed: int, stream: int = 0) -> LabelledImages:
    """Draw true renders of any subject in any scene.

    Args:
        count: How many.
        seed: Decides all of them.
        stream: Images of another stream are others.
    """
    from tqdm.auto import trange

    images, backgrounds, shapes = [], [], []
    for index in trange(count, desc="drawing"):
        random = np.random.default_rng((seed, stream, index))
        subject, scene = draw_subject(random), draw_scene(random, BACKGROUND_NAMES)
        image = np.asarray(render(subject, scene, draw_pose(random, scene), random))
        images.append((shrink(image[None])[0] * 255).round().to(torch.uint8))
        backgrounds.append(BACKGROUND_NAMES.index(scene.background))
        shapes.append(SHAPE_NAMES.index(subject.shape))
    return LabelledImages(torch.stack(images), torch.tensor(backgrounds), torch.tensor(shapes))


def roughen(images: Tensor, random: torch.Generator) -> Tensor:
    """Mirror, shift, blur, recolour and sprinkle images, each by a lot of its own.

    Args:
        images: (batch, 3, height, width), float in [0, 1].
        random: Source of everything random.

    Returns:
        As many, of the same shape, in [0, 1].
    """
    count = len(images)

    def lots(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=random)

    mirrored = torch.where(lots(0, 1) < 0.5, images, images.flip(3))
    moved = _shift(mirrored, random)
    soft = functional.avg_pool2d(functional.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blurred = moved + lots(-0.5, 1).clamp(min=0) * (soft - moved)
    recoloured = (blurred - 0.5) * lots(0.8, 1.15) + 0.5 + lots(-0.06, 0.06, 3)
    noise = torch.randn(images.shape, generator=random) * lots(0, 0.05)
    return (recoloured + noise).clamp(0, 1)


def _shift(images: Tensor, random: torch.Generator) -> Tensor:
    """Shift a whole batch by one lot; its edge pixels fill what comes free."""
    margin = MAX_SHIFT_PX
    x, y = torch.randint(0, 2 * margin + 1, (2,), generator=random).tolist()
    wide = functional.pad(images, (margin,) * 4, mode="replicate")
    return wide[:, :, y : y + INPUT_SIZE, x : x + INPUT_SIZE]


def train(config: ClassifierConfig) -> Mapping[str, str]:
    """Train the classifier, measure it on images it has not seen, and write it.

    Args:
        config: What to train and where to write it.

    Returns:
        What stands in the file's metadata: settings and accuracies.

    Raises:
        InputError: The file cannot be written.
    """
    torch.manual_seed(config.seed)
    classifier = SceneClassifier()
    _fit(classifier, draw_labelled(config.images, config.seed), config)
    held_out = draw_labelled(config.held_out, config.seed, HELD_OUT_STREAM)
    settings = {key: str(value) for key, value in config.to_dict().items() if key != "out"}
    save_classifier(classifier, config.out, settings)
    # measured as it is read: in half precision
    metadata = {**settings, **measure(load_classifier(config.out), held_out, config.seed)}
    save_classifier(classifier, config.out, metadata)
    logger.info("%s: %s", Path(config.out).name, metadata)
    return metadata


def save_classifier(
    classifier: SceneClassifier, path: str | Path, metadata: Mapping[str, str]
) -> None:
    """Write a classifier in half precision.

    Args:
        classifier: What to write.
        path: Target; its folder must exist.
        metadata: How it was trained and how well it does.

    Raises:
        InputError: The folder does not exist or cannot be written to.
    """
    tensors = {
        key: value.half() if value.is_floating_point() else value
        for key, value in classifier.state_dict().items()
    }
    write_tensor_file(path, tensors, {"format": FORMAT, **metadata})


def _fit(classifier: SceneClassifier, data: LabelledImages, config: ClassifierConfig) -> None:
    from tqdm.auto import trange

    random = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), config.learning_rate, weight_decay=0.01)
    pace = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    classifier.train()
    bar = trange(config.steps, desc="training")
    for step in bar:
        chosen = torch.randint(len(data.images), (config.batch,), generator=random)
        backgrounds, shapes = classifier(roughen(data.images[chosen].float() / 255, random))
        loss = functional.cross_entropy(backgrounds, data.backgrounds[chosen])
        loss = loss + functional.cross_entropy(shapes, data.shapes[chosen], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pace.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    classifier.eval()


@torch.no_grad()
def measure(classifier: SceneClassifier, data: LabelledImages, seed: int = 0) -> dict[str, str]:
    """Measure the share of images whose background and whose shape are recognised.

    Args:
        classifier: As ``load_classifier`` returns it.
        data: Images that it was not trained on.
        seed: Decides how the rough ones are roughened.

    Returns:
        ``background_accuracy``, ``shape_accuracy`` and the same of roughened images, in decimals as text.
    """
    random = torch.Generator().manual_seed(seed)
    right: dict[str, int] = {}
    for chosen in torch.arange(len(data.images)).split(MEASURED_BATCH):
        clean = data.images[chosen].float() / 255
        for kind, images in (("", clean), ("rough_", roughen(clean, random))):
            backgrounds, shapes = (logits.argmax(dim=1) for logits in classifier(images))
            for name, found, truth in (
                ("background", backgrounds, data.backgrounds[chosen]),
                ("shape", shapes, data.shapes[chosen]),
            ):
                key = f"{kind}{name}_accuracy"
                right[key] = right.get(key, 0) + int((found == truth).sum())
    return {key: f"{count / len(data.images):.4f}" for key, count in right.items()}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(
        parse_config(
            ClassifierConfig,
            sys.argv[1:],
            program="python -m research.demo_model.train_classifier",
        )
    )
