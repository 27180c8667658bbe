"""``python -m dreamcache_core.evaluation.demo_matching``: sheets on which people match generated subjects to references."""

from __future__ import annotations

import json
import logging
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..checkpoints import load_adapters
from ..config import Config
from ..config_flags import parse_config
from ..demo.gallery import STEPS
from ..demo.model_files import require_demo_files
from ..diffusers_loading import load_diffusers_pipeline
from ..errors import InputError
from ..image_files import contact_sheet, save_png
from ..picture_tensors import picture_to_tensor
from ..pipeline import DreamCachePipeline
from ..whole_files import whole_file
from .demo_conditions import CHOSEN, NO_REFERENCE
from .demo_sampling import generate_pictures
from .demo_triples import SEEN_SHAPES, Triple, draw_triples

logger = logging.getLogger(__name__)

ANSWERS = "answers.json"
CELL_PX = 150


@dataclass(frozen=True, kw_only=True)
class MatchingOptions(Config):
    """Draw sheets for a blind test: references with letters, pictures of the same shape with numbers, shuffled."""

    out: str = field(metadata={"help": "folder for the sheets and the answers"})
    folder: str | None = field(
        default=None, metadata={"help": "holds model and adapters; else what comes along"}
    )
    shapes: list[str] = field(
        default_factory=lambda: ["mug", "house", "star", "cat"],
        metadata={"help": "shapes, one line of references each"},
    )
    subjects: int = field(default=5, metadata={"help": "held-out subjects of each shape"})
    steps: int = field(default=STEPS, metadata={"help": "sampling steps"})
    seed: int = field(default=100, metadata={"help": "decides subjects, scenes and order"})

    def __post_init__(self) -> None:
        """Check what is asked for.

        Raises:
            InputError: A shape is unknown, or there are too few or too many subjects.
        """
        unknown = [name for name in self.shapes if name not in SEEN_SHAPES]
        if unknown:
            raise InputError(f"There is no shape {unknown[0]!r}. Known: {', '.join(SEEN_SHAPES)}.")
        if not 2 <= self.subjects <= len(string.ascii_uppercase):
            raise InputError(f"--subjects must be in 2 ... 26; given {self.subjects}.")


def draw_matching(options: MatchingOptions) -> list[Path]:
    """Draw a sheet with and a sheet without the references' effect, and write the answers.

    Args:
        options: What to draw.

    Returns:
        The sheets, then the answers: for each sheet and shape the letter of every number.

    Raises:
        DreamCacheError: A file is missing or damaged.
    """
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    files = require_demo_files(Path(options.folder) if options.folder else None)
    pipeline = DreamCachePipeline(load_diffusers_pipeline(files.model))
    adapters = load_adapters(files.adapters)
    triples = _choose(options)
    random = np.random.default_rng(options.seed)
    answers: dict[str, dict[str, str]] = {}
    sheets: list[Path] = []
    for name, condition, used in (
        ("with_reference", CHOSEN, adapters),
        ("without_reference", NO_REFERENCE, None),
    ):
        rows, captions, answers[name] = [], [], {}
        for shape, members in triples.items():
            pictures = generate_pictures(pipeline, used, members, condition, steps=options.steps)
            order = random.permutation(len(members))
            rows += [
                [picture_to_tensor(triple.reference()) for triple in members],
                [picture_to_tensor(Image.fromarray(pictures[index])) for index in order],
            ]
            captions += [
                [f"{shape} {string.ascii_uppercase[n]}" for n in range(len(members))],
                [f"{shape} {n + 1}" for n in range(len(members))],
            ]
            answers[name][shape] = "".join(string.ascii_uppercase[index] for index in order)
        sheets.append(out / f"{name}.png")
        save_png(sheets[-1], contact_sheet(rows, captions, cell_px=CELL_PX))
    with whole_file(out / ANSWERS) as unfinished:
        unfinished.write_text(f"{json.dumps(answers, indent=2)}\n", encoding="utf-8")
    return [*sheets, out / ANSWERS]


def _choose(options: MatchingOptions) -> dict[str, Sequence[Triple]]:
    """The first held-out subjects of each shape; the seen shapes take turns in the list."""
    triples = draw_triples(options.seed, options.subjects * len(SEEN_SHAPES), 0)
    return {
        shape: [triple for triple in triples if triple.subject.shape == shape]
        for shape in options.shapes
    }


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    program = "python -m dreamcache_core.evaluation.demo_matching"
    for path in draw_matching(parse_config(MatchingOptions, argv, program=program)):
        logger.info("%s", path)
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(sys.argv[1:]))
