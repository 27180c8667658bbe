"""Adapters trained through diffusers, run by ComfyUI's U-Net; and some trained here, for the way back."""

import os
from pathlib import Path

import pytest
import torch
from golden import load_case
from safetensors.torch import load_file, save_file
from test_golden_comfy import golden_model
from test_training_nodes import train
from tiny import CORE

FOLDER = Path(os.environ.get("EXCHANGE_FOLDER", "absent"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the folder comes from tests/nodes")


@pytest.fixture(scope="module")
def model():
    return golden_model(load_case("sd21_tiny"))


@torch.no_grad()
def predict(model, adapters, inputs):
    unet = model.model.diffusion_model
    cache = CORE.capture_reference(unet, inputs["x_ref_t1"], 1, inputs["null_text"])
    x = inputs["x_T"]
    text = inputs["positive_text"].expand(len(x), -1, -1)
    with CORE.inject(unet, CORE.ReferenceUse(cache, adapters)):
        return unet(x, torch.full((len(x),), 601.0), context=text)


def test_adapters_trained_through_diffusers_predict_the_same_here(model):
    inputs = load_file(FOLDER / "expected.safetensors")
    adapters = CORE.load_adapters(FOLDER / "adapters.safetensors")
    ours = predict(model, adapters, inputs)
    assert float((ours - inputs["eps"]).abs().max()) < 1e-4
    plain = predict(model, adapters, {**inputs, "x_ref_t1": inputs["x_ref_t1"].flip(-1)})
    assert float((plain - inputs["eps"]).abs().max()) > 1e-3, "the reference has no effect"


def test_adapters_trained_here_are_left_for_diffusers(model):
    adapters, _ = train(model, steps=4, learning_rate=1e-2, init="paper")
    version = Path(os.environ["COMFYUI_FOLDER"]).name
    CORE.save_adapters(adapters, FOLDER / f"from-{version}.safetensors")
    eps = predict(model, adapters, load_file(FOLDER / "expected.safetensors"))
    save_file({"eps": eps}, FOLDER / f"eps-{version}.safetensors")
