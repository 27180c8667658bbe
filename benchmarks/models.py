"""Stable Diffusion pipelines with random weights, from SD 2.1's own size down."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 77


@dataclass(frozen=True)
class Size:
    """Widths and depths of a pipeline; the structure is Stable Diffusion's: 4 levels, a VAE of factor 8.

    Attributes:
        unet: Channels of the U-Net's levels.
        heads: Attention heads of its levels.
        vae: Channels of the VAE's levels.
        groups: Groups of all group norms.
        text_width: Channels of the text states.
        text_layers: Layers of the text encoder.
        text_heads: Attention heads of it.
        vocabulary: Entries of its embedding, at least those of the tokenizer.
        resolution: Side of the images that go with it, pixels.
        linear_projection: Whether the U-Net's attention modules project by ``Linear`` (SD 2) or by convolution (SD 1).
    """

    unet: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    vae: tuple[int, int, int, int]
    groups: int
    text_width: int
    text_layers: int
    text_heads: int
    vocabulary: int
    resolution: int
    linear_projection: bool = True


SIZES = {
    "tiny": Size(
        (16, 16, 32, 32), (2, 2, 4, 4), (8, 8, 16, 16), 4, 32, 2, 4, 64, 64
    ),  # for tests of the benchmarks themselves
    "small": Size((64, 128, 256, 256), (1, 2, 4, 4), (24, 56, 104, 104), 8, 160, 6, 4, 64, 192),
    "sd21": Size(
        (320, 640, 1280, 1280),
        (5, 10, 20, 20),
        (128, 256, 512, 512),
        32,
        1024,
        23,
        16,
        49408,
        512,
    ),
    "sd15": Size(
        (320, 640, 1280, 1280),
        (8, 8, 8, 8),
        (128, 256, 512, 512),
        32,
        768,
        12,
        12,
        49408,
        512,
        linear_projection=False,
    ),
}
"""By name. ``sd21``: Stable Diffusion 2.1-base, 865.9 M parameters in the U-Net. ``small``: the same cut down such that
the operations of one encoding by the VAE (1.43) and one by the text encoder (0.07) relate to those of one call of the
U-Net (1) nearly as they do in SD 2.1 at 512 x 512 (1.39 and 0.06; 804 GFLOP are 1), and tokens to channels at its highest
level likewise (9 to 1, there 13 to 1)."""

SDXL = "sdxl"
UNETS = (*SIZES, SDXL)
"""Sizes that a U-Net can be had in alone."""


def write_model(folder: Path, size: Size, seed: int = 0) -> Path:
    """Write a pipeline with random weights as a diffusers folder, in float16.

    Args:
        folder: The folder to make.
        size: Widths and depths.
        seed: Seed of the weights; the global random state is left alone.

    Returns:
        ``folder``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_vae(size),
            text_encoder=_text_encoder(size),
            tokenizer=_tokenizer(folder / "words"),
            unet=_unet(size),
            scheduler=_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(str(folder))
    del pipeline, part
    gc.collect()  # gigabytes at full size, and whoever made them wants to load them again
    return folder


def make_unet(name: str, latent: int) -> UNet2DConditionModel:
    """Build a U-Net with random weights, in float32.

    Args:
        name: One of ``UNETS``.
        latent: Height and width of the latents it is told to be for.

    Returns:
        The U-Net, frozen, in evaluation mode.
    """
    unet = _sdxl_unet() if name == SDXL else _unet(SIZES[name])
    unet.register_to_config(sample_size=latent)
    return unet.eval().requires_grad_(False)


def _sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _unet(size: Size) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size.resolution // 8,
        block_out_channels=size.unet,
        layers_per_block=2,
        cross_attention_dim=size.text_width,
        attention_head_dim=size.heads,  # diffusers' name for the number of heads
        use_linear_projection=size.linear_projection,
        norm_num_groups=size.groups,
    )


def _vae(size: Size) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=size.groups,
        scaling_factor=0.18215,
        sample_size=size.resolution,
    )


def _text_encoder(size: Size) -> CLIPTextModel:
    words = _vocabulary()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_heads,
            max_position_embeddings=TOKENS,
            hidden_act="gelu",
            bos_token_id=words["<|startoftext|>"],
            eos_token_id=words["<|endoftext|>"],
            pad_token_id=words["<|endoftext|>"],
        )
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def _vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer over single letters; states are as long as with the real one."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=TOKENS)
