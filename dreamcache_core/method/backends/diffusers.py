"""diffusers' ``UNet2DConditionModel``; its layers get ldm's names. Duck-typed: diffusers is not imported."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ..layers import AttentionSite, Part
from .base import is_attention_module


def accepts(unet: nn.Module) -> bool:
    """Whether the module has diffusers' U-Net parts."""
    return all(hasattr(unet, part) for part in ("down_blocks", "mid_block", "up_blocks"))


def attention_sites(unet: nn.Module) -> tuple[AttentionSite, ...]:
    """List all attention modules in execution order, encoder first.

    Raises:
        UnsupportedModelError: A video U-Net, whose blocks hold modules over time.
    """
    names = [name for name, _ in unet.named_modules()]
    if any("temporal" in name or "temp_attentions" in name or "motion" in name for name in names):
        raise UnsupportedModelError(
            "DreamCache works on image U-Nets; this U-Net has layers over time (a video model). "
            "Load a Stable Diffusion 1.x, 2.x or SDXL model."
        )
    return tuple(_walk(unet))


def call(
    unet: nn.Module, latent: Tensor, timestep: Tensor, text_states: Tensor, **kwargs: Any
) -> Tensor:
    """Run one forward pass."""
    return unet(latent, timestep, encoder_hidden_states=text_states, return_dict=False, **kwargs)[0]


def _walk(unet: Any) -> Iterator[AttentionSite]:
    # ldm's input_blocks.0 is conv_in; then every resnet and every downsampler takes one number
    index = 1
    for i, block in enumerate(unet.down_blocks):
        yield from _sites_of(block, f"down_blocks.{i}", "encoder", "input_blocks", index)
        index += len(block.resnets) + (block.downsamplers is not None)
    for j, module in _attentions(unet.mid_block):
        # ldm's middle_block is resnet, attention, resnet
        yield AttentionSite(
            f"middle_block.{2 * j + 1}", f"mid_block.attentions.{j}", "middle", module
        )
    index = 0
    for i, block in enumerate(unet.up_blocks):
        yield from _sites_of(block, f"up_blocks.{i}", "decoder", "output_blocks", index)
        index += len(block.resnets)


def _attentions(block: Any) -> list[tuple[int, nn.Module]]:
    modules = enumerate(getattr(block, "attentions", None) or [])
    # blocks without attention to text (AttnDownBlock2D) hold modules of another kind
    return [(j, module) for j, module in modules if is_attention_module(module)]


def _sites_of(
    block: Any, native: str, part: Part, prefix: str, first_index: int
) -> Iterator[AttentionSite]:
    for j, module in _attentions(block):
        name = f"{prefix}.{first_index + j}.1"
        yield AttentionSite(name, f"{native}.attentions.{j}", part, module)
