"""Generates the triples' images under a condition, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    """Generate one image for each triple, in one batch; an image does not depend on the others.

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


def _encode(
    pipeline: DreamCachePipeline,
    adapters: AdapterSet,
    triples: Sequence[Triple],
    condition: Condition,
) -> ReferenceCache:
    """Cache each triple's images as one row."""
    caches = [_encode_subject(pipeline, adapters, triple, condition) for triple in triples]
    features = {
        layer: _side_by_side([c.features[layer] for c in caches]) for layer in adapters.layers
    }
    masks = {
        layer: _side_by_side([cache.masks[layer] for cache in caches if cache.masks])
        for layer in adapters.layers
        if condition.masked
    }
    return replace(caches[0], features=features, masks=masks or None)


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """Put the images of each subject side by side in its row: their order does not matter to attention."""
    return torch.cat([torch.cat(images.split(1), dim=-1) for images in rows])


def _encode_subject(
    pipeline: DreamCachePipeline, adapters: AdapterSet, triple: Triple, condition: Condition
) -> ReferenceCache:
    numbers = range(condition.references)
    masks = np.stack([triple.reference_mask(n) for n in numbers])
    return pipeline.encode_reference(
        torch.cat([image_to_tensor(triple.reference(n)) for n in numbers]),
        mask=torch.from_numpy(masks) if condition.masked else None,
        prompt=triple.prompt if condition.captioned else "",
        timestep=adapters.info.timestep,
        layers=adapters.layers,
    )
