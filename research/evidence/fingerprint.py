"""Tells measurements apart that were made of another world, by another measure or by another classifier."""

from __future__ import annotations

import hashlib

import numpy as np

from dreamcache_core.demo.measures.classifier import WEIGHTS
from dreamcache_core.demo.measures.match import measure_match

from .triples import draw_triples

NUM_DRAWN = 4
"""Triples of each group that stand for all."""


def fingerprint_of_measure() -> str:
    """Digest of a few triples with their images, of what is measured of these, and of the classifier.

    Returns:
        Sixteen hexadecimal digits.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    digest = hashlib.sha256(WEIGHTS.read_bytes())
    for triple in draw_triples(0, NUM_DRAWN, NUM_DRAWN):
        images = (triple.reference(), triple.true_image(), triple.other_image())
        for image in images:
            digest.update(np.asarray(image).tobytes())
        found = [measure_match(image, triple.subject).match for image in images[1:]]
        digest.update(f"{triple.prompt} {triple.seed} {np.round(found, 3)}".encode())
    return digest.hexdigest()[:16]
