"""What the measure of the demo world gives for images that are right and for images that are wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dreamcache_core.demo.measures.match import SubjectMatch, measure_match
from dreamcache_core.demo.world.world import Subject

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

    def separation(self, value: Callable[[SubjectMatch], float]) -> float:
        """Probability that a right image has a higher value than a wrong one (AUC); 0.5 is chance.

        Args:
            value: What is compared; higher is better: ``lambda match: match.match``.
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
