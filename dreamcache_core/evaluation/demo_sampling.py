"""Generates the triples' pictures under a condition, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..adapter import AdapterSet
from ..blending import ReferenceUse
from ..cache import ReferenceCache
from ..demo.gallery import STEPS
from ..picture_tensors import picture_to_tensor
from ..pipeline import DreamCachePipeline
from .demo_conditions import Condition
from .demo_triples import Triple


def generate_pictures(
    pipeline: DreamCachePipeline,
    adapters: AdapterSet | None,
    triples: Sequence[Triple],
    condition: Condition,
    *,
    steps: int = STEPS,
) -> np.ndarray:
    """Generate one picture for each triple, in one batch; a picture does not depend on the others.

    Args:
        pipeline: The model.
        adapters: The condition's adapters; ``None``: no reference.
        triples: What to draw.
        condition: How.
        steps: Sampling steps.

    Returns:
        8-bit RGB, (triples, height, width, 3).
    """
    uses: list[ReferenceUse] = []
    if adapters is not None:
        reference = _encode(pipeline, adapters, triples, condition)
        uses.append(ReferenceUse(reference, adapters, per_row=True))
    pictures: Tensor = pipeline(
        [triple.prompt for triple in triples],
        uses,
        text_scale=condition.text_guidance,
        image_scale=condition.image_guidance,
        guidance=condition.mode,
        image_range=condition.image_range,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(triple.seed) for triple in triples],
        output_type="pt",
    )
    return (pictures.permute(0, 2, 3, 1) * 255.0).round().byte().cpu().numpy()


def batches(triples: Sequence[Triple], size: int) -> Iterator[Sequence[Triple]]:
    """Cut a list of triples into batches."""
    for start in range(0, len(triples), size):
        yield triples[start : start + size]


def _encode(
    pipeline: DreamCachePipeline,
    adapters: AdapterSet,
    triples: Sequence[Triple],
    condition: Condition,
) -> ReferenceCache:
    """Cache each triple's pictures as one row."""
    caches = [_encode_subject(pipeline, adapters, triple, condition) for triple in triples]
    features = {
        # the pictures of one subject side by side: their order does not matter to attention
        layer: torch.cat([torch.cat(cache.features[layer].split(1), dim=3) for cache in caches])
        for layer in adapters.layers
    }
    first = caches[0]
    return ReferenceCache(
        features, first.context_width, first.latent_size, first.timestep, first.seed
    )


def _encode_subject(
    pipeline: DreamCachePipeline, adapters: AdapterSet, triple: Triple, condition: Condition
) -> ReferenceCache:
    pictures = [picture_to_tensor(triple.reference(n)) for n in range(condition.references)]
    return pipeline.encode_reference(
        torch.cat(pictures),
        prompt=f"a {triple.subject.shape}" if condition.captioned else "",
        timestep=adapters.info.timestep,
        layers=adapters.layers,
    )
