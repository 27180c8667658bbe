"""``python -m research.evidence``: generates held-out images under every condition, measures them, and writes the evidence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dreamcache_core.config import Config, check_range
from dreamcache_core.demo.files import DemoFiles, require_demo_files
from dreamcache_core.demo.gallery import STEPS
from dreamcache_core.demo.measures.classifier import load_classifier
from dreamcache_core.errors import InputError
from dreamcache_core.files.jsonl import append_lines
from dreamcache_core.method.adapter import AdapterSet
from dreamcache_core.method.adapter_files import load_adapters
from dreamcache_core.pipeline.fingerprint import model_fingerprint
from dreamcache_core.pipeline.loading import DTYPES, choose_device, load_diffusers_pipeline
from dreamcache_core.pipeline.pipeline import DreamCachePipeline

from .conditions import (
    GUIDANCE_SCALE,
    IMAGE_GUIDANCE_SCALE,
    IMAGE_RANGE,
    SHIPPED,
    Condition,
    all_conditions,
)
from .pages import keep_images
from .results import (
    Judgement,
    fingerprint_of_measure,
    judge,
    read_judgements,
    require_same_settings,
)
from .sampling import generate_images
from .tables import Evidence
from .triples import (
    EVIDENCE_SEED,
    GROUPS,
    NUM_COMBINATIONS,
    NUM_SHAPES,
    Group,
    Triple,
    draw_triples,
)
from .truths import Truths, measure_truths

logger = logging.getLogger(__name__)

VARIANT_SUFFIX = ".safetensors"
SETTINGS_FILE = "settings.json"
MODEL_PARTS = ("unet", "vae", "text_encoder", "scheduler")


@dataclass(frozen=True, kw_only=True)
class DemoEvaluationOptions(Config):
    """Measure the demo model on held-out subjects under every condition; go on where an earlier run stopped.

    Attributes:
        results: Folder of the measurements, one file a condition.
        out: Folder of the pages and plots.
        folder: Holds model and adapters; else what comes along.
        variants: Folder of adapters that were trained otherwise.
        conditions: Names of conditions to measure; none: all.
        combinations: Triples with unseen patterns and colours.
        shapes: Triples with unseen shapes.
        steps: Sampling steps.
        batch_size: Images generated at a time.
        seed: Seed of the triples; 0 gives those that settings were chosen on.
        device: Device of the model; auto: an accelerator, if there is one.
        dtype: Float type of the model.
    """

    results: str = "evidence"
    out: str = "docs/evidence"
    folder: str | None = None
    variants: str | None = None
    conditions: list[str] = field(default_factory=list[str])
    combinations: int = NUM_COMBINATIONS
    shapes: int = NUM_SHAPES
    steps: int = STEPS
    batch_size: int = 30
    seed: int = EVIDENCE_SEED
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: One is out of range.
        """
        lowest = {"combinations": 2, "shapes": 0, "steps": 1, "batch_size": 1, "seed": 0}
        for name, low in lowest.items():
            check_range(f"--{name}", getattr(self, name), low)
        if self.shapes == 1:
            raise InputError("--shapes must be 0 or at least 2, for intervals; given 1.")

    def settings(self, files: DemoFiles) -> dict[str, Any]:
        """What measurements depend on, besides condition and triple; folders by their contents.

        Args:
            files: The model and the adapters that are measured.
        """
        adapters = {"adapters": files.adapters}
        adapters |= {f"variant {name}": _variant_file(self, name) for name in _variant_names(self)}
        return {
            "world and measure": fingerprint_of_measure(),
            "seed": self.seed,
            "steps": self.steps,
            "dtype": self.dtype,
            "text guidance as shipped": GUIDANCE_SCALE,
            "image guidance as shipped": f"{IMAGE_GUIDANCE_SCALE:g} from {IMAGE_RANGE[0]:g} to {IMAGE_RANGE[1]:g} of the run",
            "model": model_fingerprint(files.model, MODEL_PARTS),
            **{name: model_fingerprint(file, ()) for name, file in adapters.items()},
        }

    def triples(self) -> list[Triple]:
        """What is measured."""
        return draw_triples(self.seed, self.combinations, self.shapes)


def chosen_conditions(options: DemoEvaluationOptions) -> list[Condition]:
    """The conditions that the options ask for.

    Raises:
        InputError: A name is none, or there is no such folder of variants.
    """
    known = {condition.name: condition for condition in all_conditions(_variant_names(options))}
    missing = [name for name in options.conditions if name not in known]
    if missing:
        raise InputError(f"There is no condition {missing[0]!r}. Known are: {', '.join(known)}.")
    return [known[name] for name in options.conditions or known]


def gather_evidence(options: DemoEvaluationOptions, command: str) -> Evidence:
    """Generate and measure what has not been measured yet, and the true images beside.

    Args:
        options: What to measure.
        command: What was called; stands on the pages.

    Raises:
        DreamCacheError: A file is missing or damaged, or an option is unfit.
    """
    conditions, triples = chosen_conditions(options), options.triples()
    results = Path(options.results)
    results.mkdir(parents=True, exist_ok=True)
    session = _Session(options)
    settings = options.settings(session.files)
    require_same_settings(results / SETTINGS_FILE, settings)
    rows = {condition: session.measure(condition, triples) for condition in conditions}
    truths: dict[Group, Truths] = {}
    for group in GROUPS:
        if members := [triple for triple in triples if triple.group == group]:
            truths[group] = measure_truths(members, session.pipeline.codec, session.classifier)
    return Evidence(rows, truths, command, options.steps, settings)


class _Session:
    """The model and whatever else is loaded once."""

    def __init__(self, options: DemoEvaluationOptions) -> None:
        self.options = options
        self.folders = image_folders(options)
        self.files = require_demo_files(Path(options.folder) if options.folder else None)
        model = load_diffusers_pipeline(self.files.model, dtype=DTYPES[options.dtype])
        self.pipeline = DreamCachePipeline(model.to(choose_device(options.device)))
        self.classifier = load_classifier()
        self.adapters: dict[str, AdapterSet] = {}

    def measure(self, condition: Condition, triples: Sequence[Triple]) -> list[Judgement]:
        """All rows of a condition; what its file has is not measured again."""
        from tqdm.auto import tqdm

        folder = self.folders[condition]
        path = Path(self.options.results) / f"{folder.name}.jsonl"
        done = {(row.group, row.index) for row in read_judgements(path)}
        left = [triple for triple in triples if (triple.group, triple.index) not in done]
        adapters = self._adapters(condition.adapters)
        with tqdm(total=len(left), desc=condition.name, disable=not left) as bar:
            for start in range(0, len(left), self.options.batch_size):
                batch = left[start : start + self.options.batch_size]
                images = generate_images(
                    self.pipeline, adapters, batch, condition, steps=self.options.steps
                )
                keep_images(folder, batch, images)
                append_lines(path, map(asdict, judge(batch, images, self.classifier)))
                bar.update(len(batch))
        by_triple = {(row.group, row.index): row for row in read_judgements(path)}
        return [by_triple[triple.group, triple.index] for triple in triples]

    def _adapters(self, name: str | None) -> AdapterSet | None:
        if name is None:
            return None
        if name not in self.adapters:
            path = self.files.adapters
            if name != SHIPPED:
                path = _variant_file(self.options, name)
            self.adapters[name] = load_adapters(path)
        return self.adapters[name]


def image_folders(options: DemoEvaluationOptions) -> dict[Condition, Path]:
    """Where each condition's images are kept; conditions that draw the same share what was measured first."""
    shared: dict[Condition, Path] = {}
    folders: dict[Condition, Path] = {}
    for condition in all_conditions(_variant_names(options)):
        folder = Path(options.results) / "images" / condition.name.replace(" ", "_")
        folders[condition] = shared.setdefault(condition.drawing, folder)
    return folders


def _variant_file(options: DemoEvaluationOptions, name: str) -> Path:
    return Path(str(options.variants)) / f"{name}{VARIANT_SUFFIX}"


def _variant_names(options: DemoEvaluationOptions) -> list[str]:
    if options.variants is None:
        return []
    folder = Path(options.variants)
    if not folder.is_dir():
        raise InputError(
            f"There is no folder {folder}. Give --variants the trained variants' folder."
        )
    return sorted(path.stem for path in folder.glob(f"*{VARIANT_SUFFIX}"))
