"""U-Nets as ldm and ComfyUI build them: ``input_blocks``, ``middle_block``, ``output_blocks``. Duck-typed."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ..layers import AttentionSite, Part
from .base import is_attention_module


def accepts(unet: nn.Module) -> bool:
    """Whether the module has ldm's three lists of blocks."""
    return all(hasattr(unet, part) for part in ("input_blocks", "middle_block", "output_blocks"))


def attention_sites(unet: nn.Module) -> tuple[AttentionSite, ...]:
    """List all attention modules in execution order, encoder first.

    Raises:
        UnsupportedModelError: A video U-Net, whose attention modules hold a stack over time.
    """
    sites = tuple(_walk(unet))
    if any(hasattr(site.module, "time_stack") for site in sites):
        raise UnsupportedModelError(
            "DreamCache works on image U-Nets; this is a video U-Net (its attention modules hold a time "
            "stack, as in Stable Video Diffusion). Load a Stable Diffusion 1.x, 2.x or SDXL model."
        )
    return sites


def call(
    unet: nn.Module, latent: Tensor, timestep: Tensor, text_states: Tensor, **kwargs: Any
) -> Tensor:
    """Run one forward pass."""
    return unet(latent, timestep, context=text_states, **kwargs)


def _walk(unet: Any) -> Iterator[AttentionSite]:
    parts: list[tuple[Part, str, Any]] = [
        ("encoder", "input_blocks", unet.input_blocks),
        ("middle", "middle_block", [unet.middle_block]),
        ("decoder", "output_blocks", unet.output_blocks),
    ]
    for part, prefix, blocks in parts:
        for index, block in enumerate(blocks):
            stem = prefix if part == "middle" else f"{prefix}.{index}"
            for child_name, child in block.named_children():
                if is_attention_module(child):
                    name = f"{stem}.{child_name}"
                    yield AttentionSite(name, name, part, child)
