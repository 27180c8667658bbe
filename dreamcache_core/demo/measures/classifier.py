"""Recognises background and shape in images of the demo world; knows nothing of the model that drew them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import FileFormatError
from ...files.tensor_file import read_tensor_file
from ..world.shapes import SHAPES
from ..world.world import PAPER, SCENE_BACKGROUNDS

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
"""The weights that come with the package."""

FORMAT = "demo-classifier/1"
BACKGROUND_NAMES = (*SCENE_BACKGROUNDS, PAPER)
SHAPE_NAMES = tuple(SHAPES)
INPUT_SIZE = 64
LAYERS = ((16, 1), (32, 2), (64, 2), (80, 2), (80, 1), (80, 2))
"""Output channels and stride of each convolution."""

BATCH = 128


@dataclass(frozen=True)
class Recognised:
    """What an image shows.

    Attributes:
        background: Likeliest background, one of ``BACKGROUND_NAMES``.
        shape: Likeliest shape, one of ``SHAPE_NAMES``.
    """

    background: str
    shape: str


class SceneClassifier(nn.Module):
    """Convolutions over an image of 64 x 64 pixels with one head for the background and one for the shape."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 3
        for width, stride in LAYERS:
            convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*blocks)
        self.background = nn.Linear(2 * channels, len(BACKGROUND_NAMES))
        self.shape = nn.Linear(2 * channels, len(SHAPE_NAMES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score backgrounds and shapes.

        Args:
            images: (batch, 3, 64, 64), float in [0, 1].

        Returns:
            Logits of backgrounds, (batch, 12), and of shapes, (batch, 16).
        """
        maps = self.features(2.0 * images - 1.0)
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return self.background(pooled), self.shape(pooled)


def shrink(images: np.ndarray) -> Tensor:
    """Bring images to the size that the classifier looks at.

    Args:
        images: 8-bit RGB, (count, side, side, 3); the side is a multiple of 64.

    Returns:
        (count, 3, 64, 64), float32 in [0, 1].
    """
    planes = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255
    return functional.avg_pool2d(planes, images.shape[1] // INPUT_SIZE)


@torch.no_grad()
def recognise(images: np.ndarray, classifier: SceneClassifier) -> list[Recognised]:
    """Recognise background and shape in each image.

    Args:
        images: 8-bit RGB, (count, side, side, 3); the side is a multiple of 64.
        classifier: As ``load_classifier`` returns it.
    """
    found: list[Recognised] = []
    for part in shrink(images).split(BATCH):
        backgrounds, shapes = (logits.argmax(dim=1).tolist() for logits in classifier(part))
        found += [
            Recognised(BACKGROUND_NAMES[background], SHAPE_NAMES[shape])
            for background, shape in zip(backgrounds, shapes, strict=True)
        ]
    return found


def load_classifier(path: str | os.PathLike[str] = WEIGHTS) -> SceneClassifier:
    """Load a trained classifier, on the CPU in float32, ready to use.

    Args:
        path: A file that the training command wrote; without it, the one that comes with the package.

    Raises:
        FileFormatError: The file is missing, damaged or of another kind or layout.
    """
    tensors, _ = read_tensor_file(path, FORMAT)
    classifier = SceneClassifier().eval()
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise FileFormatError(
            f"{path} does not fit the demo world of this version ({error}). Train it again: "
            "python -m research.demo_model.train_classifier --out FILE"
        ) from error
    return classifier
