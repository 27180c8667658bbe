"""Adapters trained by one host and run by the other, on a U-Net whose weights both have.

``expected.safetensors`` holds inputs and what diffusers predicts with the adapters of ``adapters.safetensors``.
"""

from pathlib import Path

import torch
from golden import GoldenCase, load_case
from safetensors.torch import load_file, save_file
from tiny_diffusers import golden_unet
from tiny_pipeline import tiny_pipeline
from torch import Tensor
from training_set import write_pairs

from dreamcache_core import ReferenceUse, capture_reference, inject, load_adapters
from dreamcache_core.training.config import TrainConfig
from dreamcache_core.training.loop import train
from dreamcache_core.training.run import open_run

CASE = "sd21_tiny"
STEP = 601


def train_in_diffusers(folder: Path) -> None:
    """Train adapters with the trainer, and write them with what they predict."""
    case = load_case(CASE)
    pipeline = tiny_pipeline(folder, context_width=case.context_width, unet=golden_unet(case))
    pipeline.save_pretrained(folder / "model")
    config = TrainConfig(
        model=str(folder / "model"),
        data=str(write_pairs(folder / "data", 4)),
        out=str(folder / "run"),
        resolution=64,
        steps=4,
        learning_rate=0.01,
        workers=0,
        checkpoint_every=0,
        validate_every=0,
        tracker="none",
    )
    train(open_run(config)).rename(folder / "adapters.safetensors")
    inputs = case.vectors
    kept = ("x_ref_t1", "null_text", "positive_text", "x_T")
    expected = {name: inputs[name].contiguous() for name in kept}
    expected["eps"] = predict_in_diffusers(case, folder / "adapters.safetensors")
    save_file(expected, folder / "expected.safetensors")


@torch.no_grad()
def predict_in_diffusers(case: GoldenCase, adapters_file: Path) -> Tensor:
    """The U-Net's prediction with a reference through the adapters of a file."""
    unet, inputs, adapters = golden_unet(case), case.vectors, load_adapters(adapters_file)
    cache = capture_reference(unet, inputs["x_ref_t1"], 1, inputs["null_text"])
    x = inputs["x_T"]
    with inject(unet, ReferenceUse(cache, adapters)):
        return unet(x, STEP, inputs["positive_text"].expand(len(x), -1, -1)).sample


def load_expected(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "expected.safetensors")
