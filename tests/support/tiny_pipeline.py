"""Tiny real diffusers pipelines with random weights: every part of the real ones, seconds on a CPU."""

import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny_diffusers import random_unet, sdxl_unet
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dreamcache_core import DreamCachePipeline

TOKENS = 12

# on tensors this small more threads only wait for each other
torch.set_num_threads(1)


def tiny_pipeline(folder: Path, context_width: int = 64, unet=None) -> StableDiffusionPipeline:
    """Stable Diffusion's parts; 64 x 64 pixels, 8 x 8 latents."""
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text_encoder(CLIPTextModel, context_width, seed=2),
        tokenizer=tokenizer(folder / "tokenizer_files"),
        unet=unet or random_unet(context_width, sample_size=8),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """SDXL's parts: two text encoders whose states are 2048 wide together, pooled text 32 wide."""
    words = tokenizer(folder / "tokenizer_files")
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=text_encoder(CLIPTextModel, 768, seed=2),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 1280, seed=3),
        tokenizer=words,
        tokenizer_2=words,
        unet=sdxl_unet(),
        scheduler=ddim(),
        add_watermarker=False,
    )


def single_file_weights(pipeline, ldm_unet: dict) -> dict[str, torch.Tensor]:
    """Return the state dict of a single-file checkpoint with the pipeline's VAE and text encoder."""
    text = pipeline.text_encoder.state_dict().items()
    return {
        **{f"model.diffusion_model.{key}": value for key, value in ldm_unet.items()},
        **{f"first_stage_model.{k}": v for k, v in ldm_vae(pipeline.vae.state_dict()).items()},
        **{
            f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value
            for key, value in text
        },
    }


def ldm_vae(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give a VAE of four levels ldm's names and its 1 x 1 convolutions in place of linear layers."""
    named = {}
    for key, value in weights.items():
        if "attentions" in key and key.endswith("weight") and value.ndim == 2:
            value = value[:, :, None, None]
        for pattern, new in LDM_VAE_NAMES:
            key = re.sub(pattern, new, key)
        named[key] = value
    return named


LDM_VAE_NAMES = (
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda match: f"up.{3 - int(match[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{3 - int(match[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


def wrap(pipeline) -> DreamCachePipeline:
    pipeline.set_progress_bar_config(disable=True)
    return DreamCachePipeline(pipeline)


def ddim(**overrides) -> DDIMScheduler:
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    return DDIMScheduler(**{**settings, **overrides})


def tiny_vae(seed: int = 1) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.18215,
            sample_size=64,
        ).eval()


def text_encoder(kind, width: int, seed: int):
    config = CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=32,
        bos_token_id=vocabulary()["<|startoftext|>"],
        eos_token_id=vocabulary()["<|endoftext|>"],
        pad_token_id=vocabulary()["<|endoftext|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()


def vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "a", "b"]
    words = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer over single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=TOKENS)
