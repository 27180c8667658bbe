"""What a step needs on a card that is not there: operations and bytes, counted without computing or allocating anything."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from dreamcache_core import AdapterSet, ReferenceCache, ReferenceUse, capture_features, inject
from dreamcache_core.method.adapter import AdapterInfo
from dreamcache_core.method.backends import layout_of

from .arguments import settings_of
from .flops import count_flops
from .guided import DTYPES, TIMESTEP, Settings
from .memory import peak_bytes
from .models import SDXL, TOKENS, make_unet
from .report import Report, table

GB = 1e9
CARDS_GB = (24, 80)
BATCHES, REFERENCES = (1, 16), (1, 8)
ROUNDS = 1
"""Nothing is timed."""

TITLES = (
    "images",
    "references",
    "U-Net, GB",
    "adapters, GB",
    "keys and values, GB",
    "peak of a step, GB",
    "together, GB",
    "fits",
    "TFLOP a step",
    "against the plain rows",
)


def measure(arguments: argparse.Namespace) -> Report:
    """Count what ``arguments`` ask for; see ``MEASURES``."""
    base = settings_of(arguments)
    points = [
        count_step(replace(base, batch=batch, references=references))
        for batch in BATCHES
        for references in REFERENCES
    ]
    return Report(
        name="paper",
        title=(
            f"on paper: {base.size} size, {base.latent} x {base.latent} latents, {base.dtype}; three predictions for each "
            "image, fused attention, without text encoders and VAE"
        ),
        tables=[table(TITLES, [_row(point) for point in points])],
        figures={"settings": asdict(base), "points": points},
    )


def count_step(settings: Settings) -> dict[str, Any]:
    """Count a guided step.

    Args:
        settings: What is generated; the device does not matter.

    Returns:
        Bytes of ``unet``, ``adapters``, ``keys_values`` and ``peak`` (what lives at once beside these); operations of
        the step, ``flops``, and of the same rows without a reference, ``plain_flops``.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake, dtype = FakeTensorMode(allow_non_fake_inputs=True), DTYPES[settings.dtype]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with fake, torch.no_grad():
            unet: Any = make_unet(settings.size, settings.latent)
            step = _step(unet, settings)
            plain_flops = count_flops(step)
            adapters = AdapterSet(AdapterInfo(layout_of(unet))).fuse(dtype=dtype)
            use = ReferenceUse(_reference(unet, settings), adapters)
        # which rows see the reference is read from real numbers
        rows = [seen for seen in (False, True, True) for _ in range(settings.batch)]
        with torch.no_grad(), inject(unet, use, rows=rows), fake:
            step()  # keys and values are projected once, and stay
            flops, peak = count_flops(step), peak_bytes(step, torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    values = sum(feature.numel() for feature in use.reference.features.values())
    return {
        "images": settings.batch,
        "references": settings.references,
        "unet": sum(weight.nbytes for weight in unet.parameters()),
        "adapters": adapters.nbytes,
        "keys_values": 2 * values * dtype.itemsize,
        "peak": peak,
        "flops": flops,
        "plain_flops": plain_flops,
    }


def _step(unet: Any, settings: Settings) -> Any:
    rows, side = 3 * settings.batch, settings.latent
    latents = torch.randn(rows, 4, side, side)
    text = torch.randn(rows, TOKENS, unet.config.cross_attention_dim)
    options = _conditions(rows) if settings.size == SDXL else {}
    return lambda: unet(latents, TIMESTEP, text, return_dict=False, **options)[0]


def _conditions(rows: int) -> dict[str, dict[str, Tensor]]:
    return {
        "added_cond_kwargs": {
            "text_embeds": torch.zeros(rows, 1280),
            "time_ids": torch.zeros(rows, 6),
        }
    }


def _reference(unet: Any, settings: Settings) -> ReferenceCache:
    with capture_features(unet) as features:
        _step(unet, replace(settings, batch=1))()
    shapes = {name: feature.shape[1:] for name, feature in features.items()}
    return ReferenceCache(
        {name: torch.zeros(settings.references, *shape) for name, shape in shapes.items()},
        unet.config.cross_attention_dim,
        (settings.latent, settings.latent),
    )


def _row(point: dict[str, Any]) -> tuple[str, ...]:
    parts = [point[name] / GB for name in ("unet", "adapters", "keys_values", "peak")]
    fits = [str(card) for card in CARDS_GB if sum(parts) < card]
    return (
        str(point["images"]),
        str(point["references"]),
        *(f"{part:.2f}" for part in parts),
        f"{sum(parts):.1f}",
        f"{fits[0]} GB" if fits else "none",
        f"{point['flops'] / 1e12:.1f}",
        f"{point['flops'] / point['plain_flops']:.3f}",
    )
