"""Tiny real segmenters with random weights: CLIPSeg, Grounding DINO and SAM as folders with their processors."""

from pathlib import Path

import torch
from tiny_pipeline import TOKENS, tokenizer, vocabulary
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
    SwinConfig,
    ViTImageProcessor,
)

SQUARE = {"height": 64, "width": 64}


def save_clipseg(folder: Path, seed: int = 0) -> Path:
    words = vocabulary()
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
        "bos_token_id": words["<|startoftext|>"],
        "eos_token_id": words["<|endoftext|>"],
        "pad_token_id": words["<|endoftext|>"],
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    config = CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    words_in = tokenizer(folder / "words")
    processor = CLIPSegProcessor(ViTImageProcessor(size=SQUARE), words_in)
    return _save(folder, processor, CLIPSegForImageSegmentation, config, seed)


def save_grounding_dino(folder: Path, seed: int = 0) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]
    words = [*special, *letters, *(f"##{letter}" for letter in letters)]
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 1, 1],
        window_size=2,
        patch_size=2,
        image_size=32,
        out_indices=[1, 2, 3],
    )
    text = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        num_queries=5,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=32,
        num_feature_levels=3,
        max_text_len=64,
    )
    images = GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    words_in = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    processor = GroundingDinoProcessor(images, words_in)
    return _save(folder, processor, GroundingDinoForObjectDetection, config, seed)


def save_sam(folder: Path, seed: int = 0) -> Path:
    sizes = {"image_size": 64, "patch_size": 8}
    config = SamConfig(
        vision_config={
            **sizes,
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "window_size": 0,
            "global_attn_indexes": [0],
            "num_pos_feats": 8,
            "mlp_dim": 16,
        },
        prompt_encoder_config={**sizes, "hidden_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    images = SamImageProcessor(
        size={"longest_edge": 64},
        pad_size=SQUARE,
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )
    return _save(folder, SamProcessor(images), SamModel, config, seed)


def _save(folder: Path, processor, kind, config, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
