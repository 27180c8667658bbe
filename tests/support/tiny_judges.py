"""Tiny real DINO and CLIP with random weights as folders, configured as the published ones; a set like DreamBench."""

import json
from pathlib import Path

import torch
from PIL import Image
from tiny_pipeline import TOKENS, tokenizer, vocabulary
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

SIDE = 32


def save_dino(folder: Path, seed: int = 0, **changes) -> Path:
    settings = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
        "initializer_range": 0.5,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTModel(ViTConfig(**{**settings, **changes}), add_pooling_layer=False)
    model.save_pretrained(folder)
    _write_preprocessor(folder, "ViTFeatureExtractor", size=SIDE)
    return folder


def save_clip(folder: Path, seed: int = 0) -> Path:
    words = vocabulary()
    shared = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    config = CLIPConfig(
        text_config={
            **shared,
            "vocab_size": len(words),
            "max_position_embeddings": TOKENS,
            "bos_token_id": words["<|startoftext|>"],
            "eos_token_id": words["<|endoftext|>"],
            "pad_token_id": words["<|endoftext|>"],
        },
        vision_config={**shared, "image_size": SIDE, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    _write_preprocessor(folder, "CLIPFeatureExtractor", size=SIDE, crop_size=SIDE)
    return folder


def _write_preprocessor(folder: Path, kind: str, **sizes) -> None:
    """Write it in the form of the published folders, which is older than the library."""
    values = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": kind,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        **sizes,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def save_image(path: Path, seed: int, side: int = 40) -> Path:
    """Write an image of coloured tiles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, 256, (5, 5, 3), generator=random, dtype=torch.uint8)
    image = Image.frombytes("RGB", (5, 5), bytes(tiles.flatten().tolist()))
    image.resize((side, side), Image.Resampling.NEAREST).save(path)
    return path


def save_mask(path: Path, side: int = 40) -> Path:
    """Mark the middle."""
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (8, 8, side - 8, side - 8))
    mask.save(path)
    return path
