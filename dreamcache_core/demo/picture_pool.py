"""The pictures that the demo's base model is trained on, drawn once and kept in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..whole_files import whole_file
from .backgrounds import BACKGROUNDS
from .world import PICTURE_SIZE, draw_pose, draw_scene, draw_subject, render, write_caption

WORDINGS = 4
CHUNK = 500


@dataclass(frozen=True)
class PicturePool:
    """Pictures with several captions each.

    Attributes:
        pictures: 8-bit RGB, (count, size, size, 3), mapped from a file.
        captions: ``WORDINGS`` captions of each picture.
    """

    pictures: np.ndarray
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.captions)


def open_pool(folder: Path, count: int, seed: int) -> PicturePool:
    """Open the pool of a folder, and draw it first where it is missing.

    Args:
        folder: Where its two files are, or will be.
        count: Number of pictures.
        seed: Decides all of them.
    """
    pictures, captions = (
        folder / f"pictures-{count}-{seed}.npy",
        folder / f"captions-{count}-{seed}.json",
    )
    if not captions.is_file():
        _draw(pictures, captions, count, seed)
    return PicturePool(
        np.load(pictures, mmap_mode="r"), json.loads(captions.read_text(encoding="utf-8"))
    )


def _draw(pictures: Path, captions: Path, count: int, seed: int) -> None:
    from tqdm.auto import tqdm

    pictures.parent.mkdir(parents=True, exist_ok=True)
    shape = (count, PICTURE_SIZE, PICTURE_SIZE, 3)
    drawn = np.lib.format.open_memmap(pictures, mode="w+", dtype=np.uint8, shape=shape)
    texts: list[list[str]] = []
    starts = range(0, count, CHUNK)
    with ProcessPoolExecutor() as workers:
        chunks = workers.map(partial(_draw_chunk, count=count, seed=seed), starts)
        for start, (part, words) in zip(starts, tqdm(chunks, "drawing", len(starts)), strict=True):
            drawn[start : start + len(part)] = part
            texts += words
    drawn.flush()
    with whole_file(captions) as partial_file:
        partial_file.write_text(json.dumps(texts), encoding="utf-8")


def _draw_chunk(start: int, *, count: int, seed: int) -> tuple[np.ndarray, list[list[str]]]:
    pictures, captions = [], []
    for index in range(start, min(start + CHUNK, count)):
        random = np.random.default_rng((seed, index))
        subject, scene = draw_subject(random), draw_scene(random, list(BACKGROUNDS))
        pictures.append(np.asarray(render(subject, scene, draw_pose(random, scene), random)))
        captions.append([write_caption(subject, scene, random) for _ in range(WORDINGS)])
    return np.stack(pictures), captions
