"""What was measured of generated images of the demo world, one row for each triple, in JSONL files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamcache_core.config import Config
from dreamcache_core.demo.measures.classifier import WEIGHTS, SceneClassifier, recognise
from dreamcache_core.demo.measures.match import measure_match
from dreamcache_core.errors import InputError
from dreamcache_core.files.jsonl import read_lines
from dreamcache_core.files.whole_files import whole_file

from .triples import Group, Triple, draw_triples

NUM_FINGERPRINTED = 4
"""Triples of each group that stand for all."""


@dataclass(frozen=True)
class Judgement(Config):
    """What was measured of one image.

    Attributes:
        index: The triple's place in its group.
        group: The triple's group.
        match: Subject match, 0 to 1.
        colour_error: Its colours' mean difference, Lab units.
        pattern_agreement: Share of pixels that fit the pattern, 0 to 1.
        is_found: Whether anything of the subject's shape is there.
        background: Whether the classifier sees the scene's background.
        shape: Whether the classifier sees the subject's shape.
    """

    index: int
    group: Group
    match: float
    colour_error: float
    pattern_agreement: float
    is_found: bool
    background: bool
    shape: bool

    @property
    def obedience(self) -> float:
        """Share of what the prompt names, background and shape, that is there: 0, 0.5 or 1."""
        return (self.background + self.shape) / 2


def judge(
    triples: Sequence[Triple], images: np.ndarray, classifier: SceneClassifier
) -> list[Judgement]:
    """Measure images.

    Args:
        triples: What they should show.
        images: 8-bit RGB, (triples, 128, 128, 3).
        classifier: Recognises scenes.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    judgements: list[Judgement] = []
    for triple, image, seen in zip(triples, images, recognise(images, classifier), strict=True):
        match = measure_match(image, triple.subject)
        judgements.append(
            Judgement(
                triple.index,
                triple.group,
                round(match.match, 5),
                round(match.colour_error, 3),
                round(match.pattern_agreement, 5),
                bool(match.is_found),
                seen.background == triple.scene.background,
                seen.shape == triple.subject.shape,
            )
        )
    return judgements


def read_judgements(path: Path) -> list[Judgement]:
    """Read the rows of one condition; a missing file has none, a row that was cut off is left out."""
    return [Judgement.from_dict(row) for row in read_lines(path)]


def require_same_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Note what a folder's measurements were made with; refuse to mix them with others.

    Args:
        path: JSON file in the folder.
        settings: What those to come are made with. A setting that is new there is noted as well.

    Raises:
        InputError: Those that are there were made with other settings.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, value in settings.items():
        if known.get(name, value) != value:
            raise InputError(
                f"{path.parent} holds measurements of another {name}: {known[name]}, now {value}. Give a new folder as "
                "--results, or delete it."
            )
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps({**known, **settings}, indent=2), encoding="utf-8")


def fingerprint_of_measure() -> str:
    """Digest of a few triples with their images, of what is measured of these, and of the classifier.

    Returns:
        Sixteen hexadecimal digits.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    digest = hashlib.sha256(WEIGHTS.read_bytes())
    for triple in draw_triples(0, NUM_FINGERPRINTED, NUM_FINGERPRINTED):
        images = (triple.reference(), triple.true_image(), triple.other_image())
        for image in images:
            digest.update(np.asarray(image).tobytes())
        found = [measure_match(image, triple.subject).match for image in images[1:]]
        digest.update(f"{triple.prompt} {triple.seed} {np.round(found, 3)}".encode())
    return digest.hexdigest()[:16]
