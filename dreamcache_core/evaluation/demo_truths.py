"""What true renders of the triples give: the bounds of the measure, the autoencoder's ceiling, the classifier's accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..latents import LatentCodec
from ..picture_tensors import picture_to_tensor, tensor_to_picture
from .demo_classifier import SceneClassifier, recognise
from .demo_measures import MatchBounds, SubjectMatch, measure_bounds, measure_match
from .demo_triples import Triple


@dataclass(frozen=True)
class Truths:
    """What true pictures of one group of triples give.

    Attributes:
        bounds: Of the measure.
        decoded: Of true pictures that went through the autoencoder: about what a model with it can reach.
        background: Share of true pictures whose background the classifier recognises.
        shape: Share whose shape it recognises.
    """

    bounds: MatchBounds
    decoded: tuple[SubjectMatch, ...]
    background: float
    shape: float


def measure_truths(
    triples: Sequence[Triple], codec: LatentCodec, classifier: SceneClassifier
) -> Truths:
    """Draw and measure the true pictures of triples.

    Args:
        triples: At least one.
        codec: The model's autoencoder.
        classifier: Recognises scenes.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    pictures = [triple.true_picture() for triple in triples]
    seen = recognise(np.stack([np.asarray(picture) for picture in pictures]), classifier)
    pairs = list(zip(triples, seen, strict=True))
    return Truths(
        measure_bounds(triples),
        tuple(
            measure_match(_through(codec, picture), triple.subject)
            for triple, picture in zip(triples, pictures, strict=True)
        ),
        _share([found.background == triple.scene.background for triple, found in pairs]),
        _share([found.shape == triple.subject.shape for triple, found in pairs]),
    )


@torch.no_grad()
def _through(codec: LatentCodec, picture: Image.Image) -> Image.Image:
    decoded = codec.decode(codec.encode(picture_to_tensor(picture))).float()
    return tensor_to_picture((decoded.permute(0, 2, 3, 1) + 1) / 2)


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers)
