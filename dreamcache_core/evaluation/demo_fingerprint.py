"""Tells measurements apart that were made of another world, by another measure or by another classifier."""

from __future__ import annotations

import hashlib

import numpy as np

from .demo_classifier import WEIGHTS
from .demo_measures import measure_match
from .demo_triples import draw_triples

NUM_DRAWN = 4
"""Triples of each group that stand for all."""


def fingerprint_of_measure() -> str:
    """Digest of a few triples with their pictures, of what is measured of these, and of the classifier.

    Returns:
        Sixteen hexadecimal digits.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    digest = hashlib.sha256(WEIGHTS.read_bytes())
    for triple in draw_triples(0, NUM_DRAWN, NUM_DRAWN):
        pictures = (triple.reference(), triple.true_picture(), triple.other_picture())
        for picture in pictures:
            digest.update(np.asarray(picture).tobytes())
        found = [measure_match(picture, triple.subject).match for picture in pictures[1:]]
        digest.update(f"{triple.prompt} {triple.seed} {np.round(found, 3)}".encode())
    return digest.hexdigest()[:16]
