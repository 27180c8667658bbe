"""The images that the demo's base model is trained on, drawn once and kept in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dreamcache_core.demo.world.backgrounds import BACKGROUNDS
from dreamcache_core.demo.world.world import (
    IMAGE_SIZE,
    Pose,
    Scene,
    draw_pose,
    draw_scene,
    draw_subject,
    render,
    subject_masks,
    write_caption,
)
from dreamcache_core.files.whole_files import whole_file

WORDINGS = 4
CHUNK = 500
TWIN_RATE = 0.4
"""Share of images with the subject twice: to draw two alike, self-attention must find what is where on a subject."""

TWIN_HALF_SIZES = (0.17, 0.24)

PATCH = 8
"""Side in pixels of what one latent stands for."""


@dataclass(frozen=True)
class ImagePool:
    """Images with several captions each.

    Attributes:
        images: 8-bit RGB, (count, size, size, 3), mapped from a file.
        captions: ``WORDINGS`` captions of each image.
        subjects: Whether the subject reaches into a latent's patch, boolean, (count, size / 8, size / 8).
    """

    images: np.ndarray
    captions: Sequence[Sequence[str]]
    subjects: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)


def open_pool(folder: Path, count: int, seed: int) -> ImagePool:
    """Open the pool of a folder, and draw it first where it is missing.

    Args:
        folder: Where its three files are, or will be.
        count: Number of images.
        seed: Decides all of them.
    """
    images, subjects, captions = (
        folder / f"{name}-{count}-{seed}.{ending}"
        for name, ending in (("images", "npy"), ("subjects", "npy"), ("captions", "json"))
    )
    if not captions.is_file():
        _draw(images, subjects, captions, count, seed)
    return ImagePool(
        np.load(images, mmap_mode="r"),
        json.loads(captions.read_text(encoding="utf-8")),
        np.load(subjects),
    )


def _draw(images: Path, subjects: Path, captions: Path, count: int, seed: int) -> None:
    from tqdm.auto import tqdm

    images.parent.mkdir(parents=True, exist_ok=True)
    shape = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    drawn = np.lib.format.open_memmap(images, mode="w+", dtype=np.uint8, shape=shape)
    texts: list[list[str]] = []
    reached: list[np.ndarray] = []
    starts = range(0, count, CHUNK)
    with ProcessPoolExecutor() as workers:
        chunks = workers.map(partial(_draw_chunk, count=count, seed=seed), starts)
        for start, (part, patches, words) in zip(
            starts, tqdm(chunks, "drawing", len(starts)), strict=True
        ):
            drawn[start : start + len(part)] = part
            reached.append(patches)
            texts += words
    drawn.flush()
    np.save(subjects, np.concatenate(reached))
    with whole_file(captions) as partial_file:
        partial_file.write_text(json.dumps(texts), encoding="utf-8")


def _draw_chunk(
    start: int, *, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    images, subjects, captions = [], [], []
    for index in range(start, min(start + CHUNK, count)):
        random = np.random.default_rng((seed, index))
        subject, scene = draw_subject(random), draw_scene(random, list(BACKGROUNDS))
        if random.random() < TWIN_RATE:
            scene = Scene(scene.background, has_twin=True)
            poses = draw_twin_poses(random)
        else:
            poses = [draw_pose(random, scene)]
        images.append(np.asarray(render(subject, scene, poses[0], random, *poses[1:])))
        masks = [subject_masks(subject, pose)[0] for pose in poses]
        subjects.append(_reached_patches(np.any(masks, axis=0)))
        captions.append([write_caption(subject, scene, random) for _ in range(WORDINGS)])
    return np.stack(images), np.stack(subjects), captions


def draw_twin_poses(random: np.random.Generator) -> list[Pose]:
    """Draw where a subject and its twin are: left and right, each with a size and a turn of its own."""
    return [
        Pose(
            x + random.uniform(-0.015, 0.015),
            random.uniform(0.46, 0.6),
            random.uniform(*TWIN_HALF_SIZES),
            random.uniform(-15, 15),
        )
        for x in (0.26, 0.74)
    ]


def _reached_patches(mask: np.ndarray) -> np.ndarray:
    side = len(mask) // PATCH
    return np.asarray(mask.reshape(side, PATCH, side, PATCH).any(axis=(1, 3)))
