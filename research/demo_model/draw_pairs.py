"""``python -m research.demo_model.draw_pairs``: draws the training set of the demo's adapters, a manifest with images."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.config import Config
from dreamcache_core.demo.world.world import (
    draw_known_subject,
    draw_pose,
    draw_scene,
    render,
    render_cutout,
    write_caption,
)
from dreamcache_core.errors import InputError
from dreamcache_core.files.whole_files import whole_file

MANIFEST = "pairs.jsonl"
CHUNK = 200


@dataclass(frozen=True, kw_only=True)
class PairsConfig(Config):
    """Draw pairs of a scene with a subject and the same subject cut out, in another pose; none of the held-out ones.

    Attributes:
        out: Folder for the images and the manifest.
        pairs: Number of pairs.
        seed: Decides all of them.
    """

    out: str
    pairs: int = 6000
    seed: int = 1

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            InputError: It is below 1.
        """
        if self.pairs < 1:
            raise InputError(f"--pairs must be at least 1; given {self.pairs}.")


def draw_pairs(config: PairsConfig) -> Path:
    """Draw the set.

    Args:
        config: Where, how many.

    Returns:
        The manifest, JSONL with ``image``, ``subject`` and ``caption``, as ``dreamcache train --data`` takes it.
    """
    from tqdm.auto import tqdm

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    starts = range(0, config.pairs, CHUNK)
    draw = partial(_draw_chunk, out=out, count=config.pairs, seed=config.seed)
    with ProcessPoolExecutor() as workers:
        chunks = tqdm(workers.map(draw, starts), "drawing", len(starts))
        lines = [line for chunk in chunks for line in chunk]
    with whole_file(out / MANIFEST) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return out / MANIFEST


def _draw_chunk(start: int, *, out: Path, count: int, seed: int) -> list[str]:
    lines: list[str] = []
    for index in range(start, min(start + CHUNK, count)):
        random = np.random.default_rng((seed, index))
        subject, scene = draw_known_subject(random), draw_scene(random)
        target = render(subject, scene, draw_pose(random, scene), random)
        names = {"image": f"{index:06d}.png", "subject": f"{index:06d}_subject.png"}
        for kind, image in (("image", target), ("subject", render_cutout(subject, random))):
            image.save(out / names[kind], compress_level=1)
        # neither colours nor pattern: what the caption tells, adapters need not look for in the reference
        caption = write_caption(subject, scene, random, name_pattern=False)
        lines.append(json.dumps({**names, "caption": caption}))
    return lines


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    config = parse_config(PairsConfig, argv, program="python -m research.demo_model.draw_pairs")
    logging.getLogger(__name__).info("%s", draw_pairs(config))
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(sys.argv[1:]))
