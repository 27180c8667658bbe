"""The weights that come along are as good as docs/evidence says: a few held-out subjects, generated and measured."""

import numpy as np
import pytest

from dreamcache_core.demo.files import require_demo_files
from dreamcache_core.demo.measures.classifier import load_classifier
from dreamcache_core.method.adapter_files import load_adapters
from dreamcache_core.pipeline.loading import load_diffusers_pipeline
from dreamcache_core.pipeline.pipeline import DreamCachePipeline
from research.evidence.conditions import CHOSEN, NO_REFERENCE
from research.evidence.results import judge
from research.evidence.sampling import generate_images
from research.evidence.triples import draw_triples
from research.evidence.truths import measure_bounds

pytestmark = pytest.mark.diffusers

NUM_TRIPLES = 24
LEAST_GAP_CLOSED = 0.70
MOST_OBEDIENCE_LOST = 0.05


@pytest.fixture(scope="module")
def means() -> dict[str, float]:
    """Mean match and obedience with and without reference, and the bounds of the match."""
    files = require_demo_files()
    pipeline = DreamCachePipeline(load_diffusers_pipeline(files.model))
    adapters, classifier = load_adapters(files.adapters), load_classifier()
    triples = draw_triples(0, NUM_TRIPLES, 0)
    bounds = measure_bounds(triples)
    means = {
        "upper": np.mean([found.match for found in bounds.upper]),
        "lower": np.mean([found.match for found in bounds.lower]),
    }
    for name, condition, used in (
        ("reference", CHOSEN, adapters),
        ("none", NO_REFERENCE, None),
    ):
        rows = judge(triples, generate_images(pipeline, used, triples, condition), classifier)
        means[f"{name} match"] = np.mean([row.match for row in rows])
        means[f"{name} obedience"] = np.mean([row.obedience for row in rows])
    return {name: float(mean) for name, mean in means.items()}


def gap_closed(means: dict[str, float], name: str) -> float:
    return (means[f"{name} match"] - means["lower"]) / (means["upper"] - means["lower"])


def test_the_reference_is_what_makes_the_subject_match(means: dict[str, float]):
    assert gap_closed(means, "reference") > LEAST_GAP_CLOSED
    assert gap_closed(means, "none") < 0.1


def test_scenes_stay_what_the_prompt_says(means: dict[str, float]):
    assert means["reference obedience"] > means["none obedience"] - MOST_OBEDIENCE_LOST
