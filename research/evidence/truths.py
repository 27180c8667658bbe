"""What true renders of the triples give: the bounds of the measure, the autoencoder's ceiling, the classifier's accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from PIL import Image

from dreamcache_core.demo.measures.classifier import SceneClassifier, recognise
from dreamcache_core.demo.measures.match import SubjectMatch, measure_match
from dreamcache_core.demo.world.world import Subject
from dreamcache_core.images.tensors import image_to_tensor, tensor_to_image
from dreamcache_core.pipeline.latents import LatentCodec

from .triples import Triple


@dataclass(frozen=True)
class MatchBounds:
    """What the measure gives for images that are right and for images that are wrong.

    Attributes:
        upper: Of each triple's subject truly drawn in its scene.
        lower: Of a random other subject of the same shape truly drawn there.
    """

    upper: tuple[SubjectMatch, ...]
    lower: tuple[SubjectMatch, ...]

    def separation(self, value: Callable[[SubjectMatch], float] = attrgetter("match")) -> float:
        """Probability that a right image has a higher value than a wrong one (AUC); 0.5 is chance.

        Args:
            value: What is compared; higher is better.
        """
        right = np.array([value(match) for match in self.upper])[:, None]
        wrong = np.array([value(match) for match in self.lower])
        return float(((right > wrong) + 0.5 * (right == wrong)).mean())


def measure_bounds(
    triples: Sequence[Triple], change: Callable[[Image.Image], Image.Image] | None = None
) -> MatchBounds:
    """Measure true renders of the triples' own subjects, and of random others, in the triples' scenes.

    Args:
        triples: What to draw.
        change: Done to every image before it is measured: a blur, or a way through an autoencoder. None does nothing.

    Raises:
        MissingPackageError: scipy is not installed.
    """

    def measure(image: Image.Image, subject: Subject) -> SubjectMatch:
        return measure_match(change(image) if change else image, subject)

    return MatchBounds(
        tuple(measure(triple.true_image(), triple.subject) for triple in triples),
        tuple(measure(triple.other_image(), triple.subject) for triple in triples),
    )


@dataclass(frozen=True)
class Truths:
    """What true images of one group of triples give.

    Attributes:
        bounds: Of the measure.
        decoded: Of true images that went through the autoencoder: about what a model with it can reach.
        background: Share of true images whose background the classifier recognises.
        shape: Share whose shape it recognises.
    """

    bounds: MatchBounds
    decoded: tuple[SubjectMatch, ...]
    background: float
    shape: float


def measure_truths(
    triples: Sequence[Triple], codec: LatentCodec, classifier: SceneClassifier
) -> Truths:
    """Draw and measure the true images of triples.

    Args:
        triples: At least one.
        codec: The model's autoencoder.
        classifier: Recognises scenes.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    images = [triple.true_image() for triple in triples]
    seen = recognise(np.stack([np.asarray(image) for image in images]), classifier)
    pairs = list(zip(triples, seen, strict=True))
    return Truths(
        measure_bounds(triples),
        tuple(
            measure_match(_through(codec, image), triple.subject)
            for triple, image in zip(triples, images, strict=True)
        ),
        _share([found.background == triple.scene.background for triple, found in pairs]),
        _share([found.shape == triple.subject.shape for triple, found in pairs]),
    )


@torch.no_grad()
def _through(codec: LatentCodec, image: Image.Image) -> Image.Image:
    decoded = codec.decode(codec.encode(image_to_tensor(image))).float()
    return tensor_to_image((decoded.permute(0, 2, 3, 1) + 1) / 2)


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers)
