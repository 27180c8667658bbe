"""Bytes that DreamCache adds: adapters, keys and values of a reference, and the peak of a guided step."""

from __future__ import annotations

import argparse
import gc
import resource
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from dreamcache_core import ReferenceUse, capture_reference, inject
from dreamcache_core.method.blending import prepare_layer

from .arguments import settings_of
from .guided import DREAMCACHE, DTYPES, THREE_ROWS, TIMESTEP, GuidedSteps
from .report import Bar, Report, machine, table

MB = 1e6
MOST_AT_PEAK_MB = 10.0
"""What a guided step may take at its peak beyond the same three rows of the plain U-Net, weights, keys and values apart."""

GENERATIONS = {"cpu": 3, "cuda": 30}
"""Images after which nothing more may be held than after the first."""

FULL_SIZE = ("sd21", "sd15")
ADAPTERS_MB, KEYS_VALUES_MB = 42.1, 12.2
"""Fused adapters, and keys and values of a reference of 512 x 512, in half precision, for Stable Diffusion 1 and 2."""


ROUNDS = 1
"""Timed rounds, unless told otherwise."""


def measure(arguments: argparse.Namespace) -> Report:
    """Measure what ``arguments`` ask for; see ``MEASURES``."""
    settings = settings_of(arguments)
    steps = GuidedSteps(settings)
    with steps.ready() as actions:
        peaks = {}
        for name in (THREE_ROWS, DREAMCACHE):
            actions[name]()  # keys and values are projected once, and stay
            peaks[name] = peak_bytes(actions[name], steps.device)
    held = _held_after_generations(steps, GENERATIONS[settings.device])
    extra = peaks[DREAMCACHE] - peaks[THREE_ROWS]
    values = {
        "fused adapters": sum(weight.numel() for weight in steps.fused.parameters()),
        "keys and values of a reference": _num_keys_values(steps),
        "cache of a reference (main memory)": sum(
            maps.numel() for maps in steps.reference.features.values()
        ),
    }
    rows = [
        (name, f"{count / 1e6:.2f}", f"{4 * count / MB:.1f}", f"{2 * count / MB:.1f}")
        for name, count in values.items()
    ]
    bars = [
        Bar("peak of a step beyond the plain three rows, MB", extra / MB, MOST_AT_PEAK_MB),
        Bar(f"bytes held after {len(held)} images beyond those after one", held[-1] - held[0], 0),
    ]
    if settings.size in FULL_SIZE and settings.latent == 64:
        adapters, keys_values, _ = values.values()
        bars += [
            Bar("fused adapters in half precision, MB", 2 * adapters / MB, ADAPTERS_MB),
            Bar("keys and values in half precision, MB", 2 * keys_values / MB, KEYS_VALUES_MB),
        ]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Report(
        name="memory",
        title=(
            f"memory: {settings.size} size, {settings.latent} x {settings.latent} latents, {settings.dtype}, "
            f"{machine(steps.device)}"
        ),
        tables=[
            table(("kept", "M values", "MB in float32", "MB in half precision"), rows),
            table(
                ("peak of a step, weights, keys and values apart", "MB"),
                [(name, f"{peak / MB:.1f}") for name, peak in peaks.items()],
            ),
            f"Held after each of {len(held)} images, each of a reference of its own: {held[0] / MB:.1f} MB after the first, "
            f"{max(held) / MB:.1f} MB at most, {held[-1] / MB:.1f} MB after the last.",
            f"Largest resident set of this process: {resident:.0f} MiB (weights of a base model in float32 included).",
        ],
        figures={
            "settings": asdict(settings),
            "machine": machine(steps.device),
            "values": values,
            "peak_bytes": peaks,
            "held_bytes": held,
        },
        bars=bars,
    )


def peak_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that live at once of what an action makes; what was there before does not count.

    Args:
        action: What to run.
        device: Where it computes. On a GPU torch's allocator tells; on the CPU every tensor is counted while it lives.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):
        """Counts what operations make; modules' weights and views of what was there before are left out."""

        def _pre_fw_hook(self, *_: Any) -> None: ...

        def _post_fw_hook(self, *_: Any) -> None: ...

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.is_view:
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    tracker = Tracker()
    with tracker:
        action()
    return tracker.get_tracker_snapshot("peak")[device]["Total"]


def _held_after_generations(steps: GuidedSteps, count: int) -> list[int]:
    """Bytes of tensors that live after each of several images: reference cached, injected, used and gone."""
    image, text, options = steps.latents[:1], steps.text[:1], steps.conditions
    held: list[int] = []
    for _ in range(count):
        reference = capture_reference(steps.unet, image, 1, text, unet_kwargs=options)
        with torch.no_grad(), inject(steps.unet, ReferenceUse(reference, steps.fused)):
            steps.unet(image, TIMESTEP, text, return_dict=False, **options)
        held.append(_held_bytes(steps.device))
    return held


def _held_bytes(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    # not of subclasses: the fake tensors that a compiler keeps have no bytes
    tensors = (entry for entry in gc.get_objects() if type(entry) in (Tensor, nn.Parameter))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _num_keys_values(steps: GuidedSteps) -> int:
    use = ReferenceUse(steps.reference, steps.fused)
    total = 0
    for layer in steps.fused.layers:
        prepared = prepare_layer(
            use, layer, steps.fused[layer], device=steps.device, dtype=DTYPES[steps.settings.dtype]
        )
        total += prepared.key.numel() + prepared.value.numel()
    return total
