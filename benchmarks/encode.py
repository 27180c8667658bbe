"""Caching a reference: one pass of the U-Net that ends at the last cached layer, against a whole one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from dreamcache_core import capture_features, capture_reference

from .arguments import settings_of
from .flops import count_flops
from .guided import TIMESTEP, GuidedSteps
from .report import Bar, Report, machine, table
from .timing import alternate, noise_warning, ratios

PLAIN, AGAIN = "plain U-Net, one row", "the same once more"
STOPPED, WHOLE = "DreamCache", "DreamCache, run to its end"

MOST_OVER_PLAIN = 0.93
"""The pass over the reference, in times of one plain call of one row; counted operations allow 0.873 at SD 2.1 size."""


ROUNDS = 5
"""Timed rounds, unless told otherwise."""


def measure(arguments: argparse.Namespace) -> Report:
    """Measure what ``arguments`` ask for; see ``MEASURES``."""
    settings = settings_of(arguments)
    steps = GuidedSteps(settings)
    actions = _actions(steps)
    seconds = alternate(actions, arguments.rounds, steps.device)
    flops = {name: count_flops(action) for name, action in actions.items()}
    against = {name: ratios(values, seconds[PLAIN]) for name, values in seconds.items()}
    rows = [(name, f"{against[name]:.3f}", f"{flops[name] / flops[PLAIN]:.3f}") for name in actions]
    cache = steps.reference
    values = sum(features.numel() for features in cache.features.values())
    bars: list[Bar] = []
    if settings.are_times_promised:
        bars.append(Bar("encoding / one plain row", against[STOPPED].median, MOST_OVER_PLAIN))
    return Report(
        name="encode",
        title=(
            f"encode: {settings.size} size, {settings.latent} x {settings.latent} latents, {settings.dtype}, "
            f"{machine(steps.device)}; median (low - high) of {arguments.rounds} rounds in turn. The VAE is not counted."
        ),
        tables=[
            table(("a pass", "one plain row = 1", "counted bound"), rows),
            f"The cache holds {values / 1e6:.2f} M values: {4 * values / 1e6:.1f} MB in float32, "
            f"{2 * values / 1e6:.1f} MB in half precision.",
            *noise_warning(against[AGAIN]),
        ],
        figures={
            "settings": asdict(settings),
            "machine": machine(steps.device),
            "seconds": seconds,
            "flops": flops,
            "cached_values": values,
        },
        bars=bars,
        plotted=against,
        plot_label="time of a pass, one plain row = 1",
    )


def _actions(steps: GuidedSteps) -> dict[str, Callable[[], Tensor | None]]:
    image, text, options = steps.latents[:1], steps.text[:1], steps.conditions

    @torch.no_grad()
    def plain() -> None:
        steps.unet(image, TIMESTEP, text, return_dict=False, **options)

    @torch.no_grad()
    def whole() -> None:
        with capture_features(steps.unet) as features:
            steps.unet(image, 1, text, return_dict=False, **options)
        for layer in features:
            features[layer].cpu()

    def stopped() -> None:
        capture_reference(steps.unet, image, 1, text, unet_kwargs=options)

    return {PLAIN: plain, AGAIN: plain, STOPPED: stopped, WHOLE: whole}
