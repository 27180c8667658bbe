"""Tiny real diffusers U-Nets with Stable Diffusion's structure."""

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from golden import GoldenCase

from dreamcache_core import AdapterInfo, AdapterSet, Layout


def golden_unet(case: GoldenCase) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=case.context_width,
        attention_head_dim=(2, 4, 8, 8) if case.head_width else case.num_heads,
        use_linear_projection=case.head_width is not None,
        norm_num_groups=32,
    )
    ldm = {f"model.diffusion_model.{key}": value for key, value in case.unet_weights.items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(ldm, unet.config))
    return unet.eval()


def random_unet(context_width: int = 768, seed: int = 0, **overrides) -> UNet2DConditionModel:
    settings = {
        "sample_size": 16,
        "block_out_channels": (32, 64, 128, 128),
        "layers_per_block": 2,
        "cross_attention_dim": context_width,
        "attention_head_dim": 4,
        "norm_num_groups": 32,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**{**settings, **overrides}).eval()


def sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's structure: attention at two levels, several blocks deep, added conditions."""
    return random_unet(
        2048,
        seed,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


def random_adapters(layout: Layout, seed: int = 0, **info) -> AdapterSet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AdapterSet(AdapterInfo(layout, **info)).requires_grad_(False)
