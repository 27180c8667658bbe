"""Generates the triples' images under a condition, many at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dreamcache_core.demo.gallery import STEPS
from dreamcache_core.images.tensors import image_to_tensor
from dreamcache_core.method.adapter import AdapterSet
from dreamcache_core.method.blending import ReferenceUse
from dreamcache_core.method.cache import ReferenceCache
from dreamcache_core.pipeline.pipeline import DreamCachePipeline

from .conditions import Condition
from .triples import Triple


def generate_images(
    pipeline: DreamCachePipeline,
    adapters: AdapterSet | None,
    triples: Sequence[Triple],
    condition: Condition,
    *,
    steps: int = STEPS,
) -> np.ndarray:
    """Generate one image for each triple, in one batch where each has one reference; an image does not depend on the others.

    Args:
        pipeline: The model.
        adapters: The condition's adapters; ``None``: no reference.
        triples: What to draw.
        condition: How.
        steps: Sampling steps.

    Returns:
        8-bit RGB, (triples, height, width, 3).
    """
    is_single = condition.references == 1
    if not is_single and len(triples) > 1:
        # a row has one reference in ``per_row``; of several together, tokens of the background are grouped by image
        alone = [generate_images(pipeline, adapters, [t], condition, steps=steps) for t in triples]
        return np.concatenate(alone)
    uses: list[ReferenceUse] = []
    if adapters is not None:
        caches = [_encode_subject(pipeline, adapters, triple, condition) for triple in triples]
        uses.append(ReferenceUse(ReferenceCache.concatenate(caches), adapters, per_row=is_single))
    images: Tensor = pipeline(
        [triple.prompt for triple in triples],
        uses,
        guidance_scale=condition.guidance_scale,
        image_guidance_scale=condition.image_guidance_scale,
        guidance=condition.mode,
        image_range=condition.image_range,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(triple.seed) for triple in triples],
        output_type="pt",
    )
    return (images.permute(0, 2, 3, 1) * 255.0).round().byte().cpu().numpy()


def _encode_subject(
    pipeline: DreamCachePipeline, adapters: AdapterSet, triple: Triple, condition: Condition
) -> ReferenceCache:
    numbers = range(condition.references)
    masks = np.stack([triple.reference_mask(n) for n in numbers])
    return pipeline.encode_reference(
        torch.cat([image_to_tensor(triple.reference(n)) for n in numbers]),
        mask=torch.from_numpy(masks) if condition.masked else None,
        prompt=triple.prompt if condition.captioned else "",
        adapters=adapters,
    )
