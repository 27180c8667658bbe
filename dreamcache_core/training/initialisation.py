"""Adapters before their first training step: fitted to the base model, or as PyTorch initialises them."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from ..errors import InputError
from ..fitting.fit import FitSettings
from ..method.adapter import AdapterInfo, AdapterSet, ReferenceAdapter
from ..method.backends import layout_of

Init = Literal["fitted", "self_attention", "identity", "paper", "sum"]

FITS: Mapping[str, FitSettings] = {
    "fitted": FitSettings(),
    "self_attention": FitSettings(reference_share=0, query_scale=1),
}
"""Start values that are fitted to the base model (``fitting.fit``), all but the timestep."""


def new_adapters(
    unet: nn.Module,
    *,
    init: Init = "identity",
    seed: int = 0,
    layers: Sequence[str] | None = None,
    timestep: int = 1,
    base_model: str = "",
    prediction: str = "epsilon",
) -> AdapterSet:
    """Make untrained adapters for a U-Net.

    ``paper``: everything random, as PyTorch initialises it. ``identity``: the same, but ``merge`` = [identity | 0], so
    that the U-Net with adapters is at first the plain U-Net, and training starts at the base model's loss. ``sum``: the
    paper's rejected way to merge (METHOD.md section 8, ablations): ``merge`` = [identity | identity], never trained, and
    ``to_out`` starts at zero, so that here too training starts at the base model's loss. ``fitted``, ``self_attention``: as
    ``identity``; a run then fits them to the base model (``FITS``), the latter so that it starts at the base model's loss.

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel``.
        init: Start values.
        seed: Seed of the random values; the global random state is left alone.
        layers: Canonical names of the layers to adapt; ``None`` takes METHOD.md's rule.
        timestep: Training index at which references are cached, 0 to 999; 1 in the paper.
        base_model: Name of the base model, for people.
        prediction: What the base model predicts, ``epsilon`` or ``v_prediction``.

    Returns:
        The adapters, float32 on the CPU.

    Raises:
        InputError: ``init`` or ``timestep`` is unknown.
        MismatchError: The U-Net has no layer of that name.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    if init not in get_args(Init):
        raise InputError(f"init must be one of {', '.join(get_args(Init))}; given {init!r}.")
    if not isinstance(timestep, int) or not 0 <= timestep <= 999:
        raise InputError(
            f"The cache's timestep must be a whole number in 0 ... 999; given {timestep!r}."
        )
    info = AdapterInfo(layout_of(unet, layers), timestep, base_model, prediction)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = AdapterSet(info)
    for layer in adapters:
        adapter = adapters[layer]
        assert isinstance(adapter, ReferenceAdapter)
        if init != "paper":
            _initialise_merge(adapter, is_sum=init == "sum")
    return adapters


@torch.no_grad()
def _initialise_merge(adapter: ReferenceAdapter, *, is_sum: bool) -> None:
    """Pass self-attention on as it is; with ``is_sum`` add what is attended to, at first nothing."""
    merge, channels = adapter.merge, adapter.channels
    merge.weight.zero_()
    merge.bias.zero_()
    merge.weight[:, :channels].fill_diagonal_(1)
    if is_sum:
        merge.weight[:, channels:].fill_diagonal_(1)
        merge.requires_grad_(False)
        adapter.to_out.weight.zero_()
        adapter.to_out.bias.zero_()
