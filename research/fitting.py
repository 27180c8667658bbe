"""``python -m research.fitting``: adapters fitted to the demo model without training, each setting on held-out triples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dreamcache_core import AdapterSet, load_adapters
from dreamcache_core.cli.main import guarded
from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.config import Config
from dreamcache_core.demo.files import require_demo_files
from dreamcache_core.demo.measures.classifier import load_classifier
from dreamcache_core.demo.measures.match import measure_match
from dreamcache_core.evaluation.statistics import Interval
from dreamcache_core.fitting.fit import FitSettings
from dreamcache_core.pipeline.fitting import adapters_from_model
from dreamcache_core.pipeline.loading import DTYPES, load_diffusers_pipeline
from dreamcache_core.pipeline.pipeline import DreamCachePipeline

from .evidence.conditions import CHOSEN, WHOLE_RUN, Condition
from .evidence.plots import Sweep, SweepPoint, plot_steps
from .evidence.results import judge
from .evidence.sampling import generate_images
from .evidence.statistics import gap_interval, mean_interval
from .evidence.triples import TUNING_SEED, Triple, draw_triples

BATCH = 30

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    **{f"timestep {t}": {"timestep": t} for t in (1, 100, 200, 400)},
    **{f"reference share {share:g}": {"reference_share": share} for share in (0.4, 0.5, 0.7, 0.8)},
    **{f"query scale {scale:g}": {"query_scale": scale} for scale in (1.0, 1.5, 2.0)},
}

GUIDANCES: Mapping[str, Mapping[str, Any]] = {
    "as shipped": {},
    **{
        f"image guidance {scale:g}": {"image_guidance_scale": scale, "image_range": WHOLE_RUN}
        for scale in (0.4, 1.0, 2.0)
    },
}


@dataclass(frozen=True, kw_only=True)
class FittingConfig(Config):
    """Fit adapters to the demo model, draw held-out triples with them and measure these.

    Attributes:
        seed: Of the list of triples; 0 is for choosing, 1 for measuring what was chosen.
        combinations: Triples of new patterns and colours.
        shapes: Triples of new shapes.
        search: Vary the settings one at a time; else the image guidance.
        adapters: Adapter files to measure instead, and those fitted to the model.
        plot: PNG of the gap closed by training steps to write.
        dtype: Float type that images are drawn in.
    """

    seed: int = TUNING_SEED
    combinations: int = 72
    shapes: int = 0
    search: bool = False
    adapters: list[str] = field(default_factory=list[str])
    plot: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


def measure(argv: Sequence[str]) -> None:
    """Print a line for each setting, or for each adapter file; and plot these by their steps."""
    config = parse_config(FittingConfig, argv, program="python -m research.fitting")
    triples = draw_triples(config.seed, config.combinations, config.shapes)
    model = require_demo_files().model
    precise, fast = (
        DreamCachePipeline(load_diffusers_pipeline(model, dtype=dtype))
        for dtype in (torch.float32, DTYPES[config.dtype])
    )
    print("| setting | group | gap closed | subject match | obedience |\n|---|---|---|---|---|")
    sweeps: dict[str, list[SweepPoint]] = {}
    for name, adapters, condition in _settings(config, precise):
        for group in dict.fromkeys(triple.group for triple in triples):
            chosen = [triple for triple in triples if triple.group == group]
            gap, match, obedience = _figures(fast, adapters, chosen, condition)
            print(f"| {name} | {group} | {gap} | {match} | {obedience} |", flush=True)
            start, steps = _course(adapters)
            sweeps.setdefault(start, []).append(SweepPoint("", Interval(steps), gap))
    if config.plot is not None:
        lines = [
            Sweep(start, sorted(points, key=lambda point: point.across.value))
            for start, points in sweeps.items()
        ]
        plot_steps(lines, Path(config.plot))


def _settings(
    config: FittingConfig, pipeline: DreamCachePipeline
) -> Iterator[tuple[str, AdapterSet, Condition]]:
    """Yield what is measured: its name, adapters, and how images are drawn with them."""
    for file in config.adapters:
        adapters = load_adapters(file)
        start, steps = _course(adapters)
        yield f"{start}, {steps} steps", adapters, CHOSEN
    if config.adapters:
        yield "fitted, 0 steps", adapters_from_model(pipeline), CHOSEN
    elif config.search:
        for name, changes in SETTINGS.items():
            yield name, adapters_from_model(pipeline, settings=FitSettings(**changes)), CHOSEN
    else:
        adapters = adapters_from_model(pipeline)
        for name, changes in GUIDANCES.items():
            yield name, adapters, replace(CHOSEN, **changes)


def _course(adapters: AdapterSet) -> tuple[str, int]:
    """From which start adapters were trained, and for how many steps."""
    training = json.loads(adapters.info.extra.get("training", "{}"))
    start = "other adapters" if training.get("adapters") else training.get("init", "fitted")
    return start, training.get("step", 0)


def _figures(
    pipeline: DreamCachePipeline,
    adapters: AdapterSet,
    triples: Sequence[Triple],
    condition: Condition,
) -> tuple[Interval, Interval, Interval]:
    batches = [triples[start : start + BATCH] for start in range(0, len(triples), BATCH)]
    images = [generate_images(pipeline, adapters, batch, condition) for batch in batches]
    judgements = judge(triples, np.concatenate(images), load_classifier())
    match = [judgement.match for judgement in judgements]
    lower, upper = (
        [measure_match(np.asarray(image), triple.subject).match for triple, image in pairs]
        for pairs in (
            [(triple, triple.other_image()) for triple in triples],
            [(triple, triple.true_image()) for triple in triples],
        )
    )
    return (
        gap_interval(match, lower, upper),
        mean_interval(match),
        mean_interval([judgement.obedience for judgement in judgements]),
    )


if __name__ == "__main__":
    sys.exit(guarded(measure, sys.argv[1:]))
