"""A world small enough to train on in seconds: a disc on a plain ground, and a base model that knows it.

Its autoencoder is written down, not trained: a latent value is the mean colour of eight by eight pixels. The weights
of its U-Net lie in tests/golden; ``python tests/support/train_tiny_world.py`` makes them again.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_diffusers import random_unet
from tiny_pipeline import ddim, tiny_pipeline
from torch import Tensor

UNET_FILE = Path(__file__).parents[1] / "golden" / "tiny_world_unet.safetensors"
SIDE_PX = 64
RADIUS_PX = 20
CAPTION = "a b"

SCALE = 4.0
"""Latents are colours in [-1, 1] times this."""

LIFT = 1000.0
"""Raises values to where SiLU is linear, and outweighs them where GroupNorm divides by their spread."""


def disc() -> Tensor:
    """Mask of the disc, bool (height, width)."""
    along = torch.arange(SIDE_PX) - (SIDE_PX - 1) / 2
    return along[:, None] ** 2 + along[None] ** 2 < RADIUS_PX**2


def draw(colours: Tensor, grounds: Tensor) -> Tensor:
    """Draw discs: colours and grounds (images, 3) in [0, 1] -> (images, height, width, 3)."""
    mask = disc()[None, :, :, None]
    return torch.where(mask, colours[:, None, None], grounds[:, None, None])


def world_pipeline(
    folder: Path, unet: UNet2DConditionModel | None = None
) -> StableDiffusionPipeline:
    """The base model; without a U-Net, with the trained one."""
    if unet is None:
        unet = world_unet()
        unet.load_state_dict({name: w.float() for name, w in load_file(UNET_FILE).items()})
    pipeline = tiny_pipeline(folder, context_width=32, unet=unet)
    pipeline.vae = colour_vae()
    pipeline.scheduler = ddim(prediction_type="v_prediction")
    return pipeline


def world_unet() -> UNet2DConditionModel:
    """Its U-Net, untrained."""
    return random_unet(32, sample_size=8, block_out_channels=(16, 32, 32, 32), norm_num_groups=8)


@torch.no_grad()
def colour_vae() -> AutoencoderKL:
    """An autoencoder of Stable Diffusion's structure whose latents are mean colours."""
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        scaling_factor=SCALE,
        sample_size=SIDE_PX,
    )
    for name, parameter in vae.named_parameters():
        if not ("norm" in name and name.endswith("weight")):
            parameter.zero_()  # residual blocks and attention add nothing
    for part in (vae.encoder, vae.decoder):
        _copy_colours(part.conv_in)
        _lift_linearly(part)
    for block in vae.encoder.down_blocks:
        for sampler in block.downsamplers or ():
            for channel in range(8):
                sampler.conv.weight[channel, channel, :2, :2] = 0.25
    for block in vae.decoder.up_blocks:
        for sampler in block.upsamplers or ():
            for channel in range(8):
                sampler.conv.weight[channel, channel, 1, 1] = 1
    for conv in (vae.quant_conv, vae.post_quant_conv):
        for channel in range(conv.weight.shape[0]):
            conv.weight[channel, channel] = 1
    return vae.eval()


def _copy_colours(conv: torch.nn.Conv2d) -> None:
    """Keep three channels; a fourth keeps their mean at 0, and four constant ones dominate their spread."""
    for channel in range(3):
        conv.weight[channel, channel, 1, 1] = 1
        conv.weight[3, channel, 1, 1] = -1
    conv.bias[4:] = torch.tensor([LIFT, -LIFT, LIFT, -LIFT])


def _lift_linearly(part: torch.nn.Module) -> None:
    spread = LIFT * 0.5**0.5  # of four constants among eight channels
    part.conv_norm_out.weight.fill_(spread)
    part.conv_norm_out.bias.fill_(LIFT)
    for channel in range(3):
        part.conv_out.weight[channel, channel, 1, 1] = 1
        part.conv_out.bias[channel] = -LIFT
