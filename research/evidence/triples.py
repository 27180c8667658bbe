"""The held-out images that the demo's evidence is gathered on: who, in which scene, with which seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dreamcache_core.demo.world.shapes import SHAPES, UNSEEN_SHAPES
from dreamcache_core.demo.world.world import (
    Scene,
    Subject,
    draw_pose,
    draw_scene,
    draw_subject,
    render,
    render_cutout,
    write_caption,
)
from dreamcache_core.errors import InputError

Group = Literal["combination", "shape"]

GROUPS: tuple[Group, ...] = ("combination", "shape")
SEEN_SHAPES = tuple(name for name in SHAPES if name not in UNSEEN_SHAPES)
TUNING_SEED, EVIDENCE_SEED = 0, 1
"""Lists on which settings such as the guidance are chosen, and on which the result is then measured."""

NUM_COMBINATIONS = 420
NUM_SHAPES = 120
REFERENCE, TRUTH, OTHER = 1, 2, 3
"""Streams of chance beside the one that draws the triple itself."""


@dataclass(frozen=True)
class Triple:
    """One held-out question to a model: this subject, in that scene, from this seed.

    Attributes:
        index: Place in its list, from 0.
        group: ``combination``: pattern and kinds of colours never shown to adapters, shape known to them; ``shape``:
            a shape never shown to them.
        subject: Who it is.
        scene: Where it shall be.
        prompt: Names shape and scene; neither colours nor pattern.
        seed: Of the generated image's noise.
        origin: Seed of the list.
    """

    index: int
    group: Group
    subject: Subject
    scene: Scene
    prompt: str
    seed: int
    origin: int

    def reference(self, number: int = 0) -> Image.Image:
        """Draw a reference image, 128 x 128.

        Args:
            number: Which; each shows the subject on white in another pose.
        """
        return self._cutout(number).convert("RGB")

    def reference_mask(self, number: int = 0) -> np.ndarray:
        """Say where the subject is in a reference image: 1 there, 0 beside, float32 (128, 128)."""
        return np.asarray(self._cutout(number), dtype=np.float32)[..., 3] / 255

    def true_image(self) -> Image.Image:
        """Draw the subject in its scene: what a perfect model might give."""
        return self._image(self.subject, TRUTH)

    def other_image(self) -> Image.Image:
        """Draw a random other subject of the same shape in the scene: what a model without the reference might give."""
        return self._image(draw_subject(self._random(OTHER, 1), self.subject.shape), OTHER)

    def _cutout(self, number: int) -> Image.Image:
        return render_cutout(self.subject, self._random(REFERENCE, number))

    def _image(self, subject: Subject, stream: int) -> Image.Image:
        random = self._random(stream)
        return render(subject, self.scene, draw_pose(random, self.scene), random)

    def _random(self, stream: int, number: int = 0) -> np.random.Generator:
        origin = (self.origin, GROUPS.index(self.group), self.index)
        return np.random.default_rng((*origin, stream, number))


def draw_triples(
    seed: int = 0, combinations: int = NUM_COMBINATIONS, shapes: int = NUM_SHAPES
) -> list[Triple]:
    """Draw the list of triples; a shorter list of the same seed is the beginning of each group.

    Args:
        seed: Decides everything.
        combinations: Number of triples of the group ``combination``; the seen shapes take turns.
        shapes: Number of triples of the group ``shape``; the unseen shapes take turns.

    Returns:
        The group ``combination``, then the group ``shape``.

    Raises:
        InputError: A number is negative.
    """
    if min(seed, combinations, shapes) < 0:
        raise InputError(
            f"Expected a seed and numbers of triples from 0 on, got {seed}, {combinations} and {shapes}."
        )
    return [
        *(_draw_triple(seed, "combination", SEEN_SHAPES, index) for index in range(combinations)),
        *(_draw_triple(seed, "shape", UNSEEN_SHAPES, index) for index in range(shapes)),
    ]


def _draw_triple(seed: int, group: Group, shapes: tuple[str, ...], index: int) -> Triple:
    random = np.random.default_rng((seed, GROUPS.index(group), index))
    while not (subject := draw_subject(random, shapes[index % len(shapes)])).is_unseen:
        pass
    scene = draw_scene(random)
    prompt = write_caption(subject, scene, random, name_pattern=False)
    return Triple(index, group, subject, scene, prompt, int(random.integers(2**31)), seed)
