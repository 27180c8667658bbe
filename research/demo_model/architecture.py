"""The parts of the demo model before training: Stable Diffusion's structure, narrow enough to ship."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from dreamcache_core.demo.world.world import IMAGE_SIZE
from dreamcache_core.pipeline.loading import require_diffusers

LATENT_CHANNELS = 4
SCALING_FACTOR = 0.18215
"""Stable Diffusion's: latents times this have unit variance, so its latent format serves as it is."""

TEXT_WIDTH = 128
TEXT_TOKENS = 32
VOCABULARY_SIZE = 1000
NORM_GROUPS = 8
"""Groups of every GroupNorm: four channels each at the narrowest, where 32 groups of one would erase all colour."""

AUTOENCODER_CHANNELS = (32, 32, 64, 128)
UNET_CHANNELS = (64, 96, 96, 96)
HEAD_WIDTH = 32


def make_autoencoder() -> Any:
    """Build an ``AutoencoderKL`` with random weights: 8x, four latent channels."""
    levels = len(AUTOENCODER_CHANNELS)
    return require_diffusers().AutoencoderKL(
        sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=AUTOENCODER_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=NORM_GROUPS,
        scaling_factor=SCALING_FACTOR,
    )


def make_unet() -> Any:
    """Build a ``UNet2DConditionModel`` with random weights: Stable Diffusion 2's blocks, narrow."""
    return require_diffusers().UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=UNET_CHANNELS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=tuple(width // HEAD_WIDTH for width in UNET_CHANNELS),
        use_linear_projection=True,
        norm_num_groups=NORM_GROUPS,
    )


def make_scheduler() -> Any:
    """Build the scheduler: Stable Diffusion's noise levels, v prediction, ancestral sampling from the highest level on."""
    return require_diffusers().EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # StableDiffusionPipeline asks for it; trailing does not use it
    )


def make_text_encoder(tokenizer: Any) -> Any:
    """Build a ``CLIPTextModel`` with random weights for a tokenizer's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=TEXT_WIDTH,
            hidden_act="gelu",
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train_tokenizer(captions: Iterable[str]) -> Any:
    """Learn CLIP's byte-pair encoding on captions.

    Args:
        captions: Texts whose words shall be one token each; any other text is split into smaller pieces.

    Returns:
        A ``CLIPTokenizer``.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    special = ("<|startoftext|>", "<|endoftext|>")
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *special]
    untrained = CLIPTokenizer({token: index for index, token in enumerate(vocabulary)}, [])
    learnt = untrained.train_new_from_iterator(
        captions, VOCABULARY_SIZE, initial_alphabet=letters, show_progress=False
    )
    rules = json.loads(learnt.backend_tokenizer.to_str())["model"]["merges"]
    merges: Any = [(str(first), str(second)) for first, second in rules]
    known = dict.fromkeys([*vocabulary[:-2], *("".join(merge) for merge in merges), *special])
    return CLIPTokenizer(
        {token: index for index, token in enumerate(known)}, merges, model_max_length=TEXT_TOKENS
    )
