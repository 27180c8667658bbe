"""``python -m research.demo_model.train_variants``: replays the paper's ablations on the demo model, with equal short budgets."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamcache_core.cli.parsing import parse_config, read_toml
from dreamcache_core.config import Config
from dreamcache_core.data.precomputed.encoding import EncodeOptions, encode_dataset
from dreamcache_core.errors import InputError
from dreamcache_core.files.whole_files import whole_file

logger = logging.getLogger(__name__)

SETTINGS = Path(__file__).with_name("adapters.toml")
ENCODER = ["input_blocks.1.1", "input_blocks.4.1", "input_blocks.7.1"]
MIDDLE = ["middle_block.1"]
DECODER = ["output_blocks.4.1", "output_blocks.6.1", "output_blocks.8.1", "output_blocks.10.1"]
REFERENCES_PER_IMAGE = 2

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "chosen": {},
    "chosen-again": {"seed": 1},
    **{f"timestep-{timestep}": {"timestep": timestep} for timestep in (50, 150, 300, 600)},
    "layers-encoder": {"layers": ENCODER},
    "layers-middle": {"layers": MIDDLE},
    "layers-decoder": {"layers": DECODER},
    "layers-all": {"layers": [*ENCODER, *MIDDLE, *DECODER]},
    "caption": {"reference_caption": True},
    "merge-sum": {"init": "sum"},
    "init-identity": {"init": "identity"},
    "init-paper": {"init": "paper"},
    "data-4th": {"share": 4},
    "data-16th": {"share": 16},
}
"""What each variant changes in ``adapters.toml`` (METHOD.md section 8, ablations); ``share``: one pair in so many.

``merge-sum`` starts as ``init-identity`` does, with another merge; ``chosen-again`` differs in nothing but chance.
"""


@dataclass(frozen=True, kw_only=True)
class VariantsConfig(Config):
    """Train the demo's adapters otherwise than they ship, all alike but for one thing; what is there already is left.

    Attributes:
        model: Diffusers folder of the demo's base model.
        data: Manifest of the pairs, from draw_pairs.
        out: Folder for one adapter file a variant.
        work: Folder for runs and precomputed sets.
        names: Variants to train; none: all.
        steps: Optimizer steps of each.
        seed: Seed of each.
    """

    model: str
    data: str
    out: str
    work: str
    names: list[str] = field(default_factory=list[str])
    steps: int = 800
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            InputError: One is unknown, or there is no step.
        """
        unknown = [name for name in self.names if name not in VARIANTS]
        if unknown:
            raise InputError(
                f"There is no variant {unknown[0]!r}. Known are: {', '.join(VARIANTS)}."
            )
        if self.steps < 1:
            raise InputError(f"steps must be at least 1; given {self.steps}.")


def train_variants(config: VariantsConfig) -> list[Path]:
    """Train what is missing.

    Args:
        config: What to train, from what, where to.

    Returns:
        The adapter files.

    Raises:
        DreamCacheError: As ``dreamcache dataset encode`` and ``dreamcache train`` raise them.
    """
    return [_train(config, name) for name in config.names or VARIANTS]


def _train(config: VariantsConfig, name: str) -> Path:
    from dreamcache_core.training.config import TrainConfig
    from dreamcache_core.training.loop import train
    from dreamcache_core.training.run import open_run

    finished = Path(config.out) / f"{name}.safetensors"
    if finished.is_file():
        return finished
    changes, chosen = dict(VARIANTS[name]), read_toml(SETTINGS)
    encoded = _encode(config, changes.pop("share", 1), chosen["keep_reference"])
    folder = Path(config.work) / name
    settings = {
        **chosen,
        "model": config.model,
        "encoded": str(encoded),
        "out": str(folder),
        "resume": folder.is_dir(),
        "steps": config.steps,
        "warmup_steps": config.steps // 10,
        "seed": config.seed + changes.pop("seed", 0),
        "tracker": "none",
        **changes,
    }
    adapters = train(open_run(TrainConfig.from_dict(settings)))
    finished.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(finished) as unfinished:
        unfinished.write_bytes(adapters.read_bytes())
    return finished


def _encode(config: VariantsConfig, share: int, keep_reference: bool) -> Path:
    """Precompute one pair in ``share``, its references altered as the chosen adapters' are, or kept."""
    manifest = Path(config.data)
    folder = Path(config.work) / f"encoded-{share}"
    if share > 1:
        lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
        manifest = manifest.with_name(f"{manifest.stem}-{share}.jsonl")
        with whole_file(manifest) as unfinished:
            unfinished.write_text("".join(lines[::share]), encoding="utf-8")
    settings = {
        "data": str(manifest),
        "model": config.model,
        "out": str(folder),
        "reference_variants": REFERENCES_PER_IMAGE,
        "keep_reference": keep_reference,
    }
    return encode_dataset(EncodeOptions.from_dict(settings))


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    program = "python -m research.demo_model.train_variants"
    for path in train_variants(parse_config(VariantsConfig, argv, program=program)):
        logger.info("%s", path)
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(sys.argv[1:]))
