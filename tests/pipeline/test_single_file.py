"""Checkpoints of one file, whose configurations and tokenizer come along."""

import json
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from golden import load_case
from tiny_pipeline import ldm_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreamcache_core import InputError
from dreamcache_core.pipeline.loading import load_diffusers_pipeline
from dreamcache_core.pipeline.single_file.known import (
    CONTEXT_KEY,
    HERE,
    clip_tokenizer,
    known_config,
)

pytestmark = pytest.mark.diffusers


def config(family: str, part: str) -> dict:
    return json.loads((HERE / family / part / "config.json").read_text())


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write a safetensors file of float16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("ab") as stream:
        stream.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(
    ("family", "part", "kind", "millions"),
    [
        ("sd1", "unet", UNet2DConditionModel, 859.520964),
        ("sd1", "vae", AutoencoderKL, 83.653863),
        ("sd1", "text_encoder", CLIPTextModel, 123.060480),
        ("sdxl", "unet", UNet2DConditionModel, 2567.463684),
        ("sdxl", "vae", AutoencoderKL, 83.653863),
        ("sdxl", "text_encoder", CLIPTextModel, 123.060480),
        ("sdxl", "text_encoder_2", CLIPTextModelWithProjection, 694.659840),
    ],
)
def test_the_models_have_their_published_sizes(family, part, kind, millions):
    with torch.device("meta"):
        given = config(family, part)
        model = (
            kind(CLIPTextConfig(**given)) if "CLIP" in kind.__name__ else kind.from_config(given)
        )
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


def test_the_tokenizer_is_clips():
    tokenizer = clip_tokenizer(pad="!")
    assert len(tokenizer) == 49_408
    ids = tokenizer("A photo of a cat, 3D.", padding="max_length")["input_ids"]
    assert ids[:10] == [49406, 320, 1125, 539, 320, 2368, 267, 274, 323, 269]
    assert (ids[10:12], len(ids), tokenizer.model_max_length) == ([49407, 0], 77, 77)
    assert clip_tokenizer(pad="<|endoftext|>").pad_token_id == 49407


def test_a_checkpoint_of_full_size_needs_nothing_but_its_file(tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config("sd1", "unet"))
        vae = AutoencoderKL.from_config(config("sd1", "vae"))
        text = CLIPTextModel(CLIPTextConfig(**config("sd1", "text_encoder")))
    # the tiny U-Net has the same names
    names = [f"model.diffusion_model.{name}" for name in load_case("sd15_tiny").unet_weights]
    numbered = {name: torch.tensor(number) for number, name in enumerate(names)}
    converted = convert_ldm_unet_checkpoint(numbered, config=unet.config)
    shapes = {
        names[int(number)]: tuple(unet.state_dict()[key].shape) for key, number in converted.items()
    }
    for prefix, weights in (
        ("first_stage_model.", ldm_vae(vae.state_dict())),
        ("cond_stage_model.transformer.text_model.", text.state_dict()),
    ):
        shapes |= {
            prefix + key.removeprefix("text_model."): tuple(w.shape)
            for key, w in weights.items()
            if w.is_floating_point()
        }
    file = write_zeros(tmp_path / "model.safetensors", shapes)
    pipeline = load_diffusers_pipeline(file, dtype=torch.float16)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.unet.num_parameters() == 859_520_964
    assert pipeline.unet.dtype == torch.float16
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert len(pipeline.tokenizer) == 49_408


def test_the_context_tells_the_family(tmp_path):
    for width, family in ((768, "sd1"), (2048, "sdxl")):
        file = write_zeros(tmp_path / f"{width}.safetensors", {CONTEXT_KEY: (640, width)})
        assert known_config(file) == HERE / family


@pytest.mark.parametrize(
    ("name", "shapes", "cause"),
    [
        ("sd2.safetensors", {CONTEXT_KEY: (640, 1024)}, "noise or v"),
        ("v.safetensors", {CONTEXT_KEY: (640, 2048), "v_pred": (1,)}, "does not predict noise"),
        ("edm.safetensors", {CONTEXT_KEY: (640, 2048), "edm_mean": (4,)}, "does not predict noise"),
        ("lora.safetensors", {"lora_unet_x.alpha": (1,)}, "SDXL alone"),
        ("old.ckpt", {CONTEXT_KEY: (640, 768)}, "safetensors files"),
    ],
)
def test_a_file_that_does_not_tell_asks_for_the_configuration(tmp_path, name, shapes, cause):
    with pytest.raises(InputError, match=f"{cause}.*--config .*--model_config"):
        known_config(write_zeros(tmp_path / name, shapes))
