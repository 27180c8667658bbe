"""A demo model with random weights in the files that the real one ships in, and what diffusers makes of it.

``demo/`` is such a folder; ``demo.safetensors`` holds inputs and what the parts give for them.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from tiny_pipeline import ddim
from torch import Tensor

from dreamcache_core import (
    DreamCachePipeline,
    ReferenceUse,
    adapters_from_model,
    capture_reference,
    inject,
    save_adapters,
)
from dreamcache_core.demo.files import PREVIEW_FILE
from dreamcache_core.demo.world.world import SCENE_BACKGROUNDS, Scene, draw_subject, write_caption
from dreamcache_core.training.initialisation import new_adapters
from research.demo_model.architecture import (
    make_autoencoder,
    make_text_encoder,
    make_unet,
    train_tokenizer,
)

PROMPT = "a striped mug on the grass, left"
TIMESTEPS = (601, 20)


def write_demo_model(folder: Path) -> None:
    """Write a random demo model, and what diffusers predicts with it."""
    pipeline = _random_pipeline()
    adapters = new_adapters(pipeline.unet, init="paper", prediction="v_prediction")
    adapters.requires_grad_(False)
    expected = _run(pipeline, adapters)
    fitted = adapters_from_model(DreamCachePipeline(pipeline), size=64)
    save_adapters(fitted, folder / "fitted.safetensors")
    files = folder / "demo" / "model"
    pipeline.to(dtype=torch.float16).save_pretrained(files)
    pipeline.tokenizer.backend_tokenizer.model.save(str(files / "tokenizer"))
    preview = {"factors": [[0.5, 0.0, 0.0]] * 4, "bias": [0.0] * 3}
    (files / PREVIEW_FILE).write_text(json.dumps(preview))
    save_adapters(adapters, folder / "demo" / "adapters.safetensors")
    save_file(expected, folder / "demo.safetensors")


@torch.no_grad()
def _run(pipeline: StableDiffusionPipeline, adapters) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # neither square nor one alone: swapped axes and mixed up rows show
    x, reference, pixels = normal(2, 4, 12, 16), normal(1, 4, 16, 16), normal(1, 3, 64, 96).tanh()
    ids = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    states = pipeline.text_encoder(ids)[0]
    times = torch.tensor(TIMESTEPS)
    cache = capture_reference(pipeline.unet, reference, 1, states)

    def predict() -> Tensor:
        return pipeline.unet(x, times, states.expand(2, -1, -1)).sample

    plain = predict()
    with inject(pipeline.unet, ReferenceUse(cache, adapters)):
        guided = predict()
    results = {
        "x": x,
        "times": times.float(),
        "reference": reference,
        "pixels": pixels,
        "ids": ids,
        "states": states,
        "plain": plain,
        "guided": guided,
        "decoded": pipeline.vae.decode(x).sample,
        "encoded": pipeline.vae.encode(pixels).latent_dist.mode(),
        "alphas_cumprod": pipeline.scheduler.alphas_cumprod,
    }
    return {name: tensor.contiguous() for name, tensor in results.items()}


def _random_pipeline() -> StableDiffusionPipeline:
    random = np.random.default_rng(0)
    captions = [
        write_caption(draw_subject(random), Scene(background, place="left"), random)
        for background in SCENE_BACKGROUNDS * 5
    ]
    tokenizer = train_tokenizer(captions)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "vae": make_autoencoder(),
            "text_encoder": make_text_encoder(tokenizer),
            "unet": make_unet(),
        }
        for module in parts.values():
            for parameter in module.parameters():
                if parameter.ndim == 1:  # so that no norm or bias equals another
                    parameter.data += 0.1 * torch.randn(parameter.shape)
                parameter.data = parameter.data.half().float()  # as it will be on disk
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=ddim(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
