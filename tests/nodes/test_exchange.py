"""Adapters trained inside ComfyUI, run by diffusers."""

import torch
from exchange import CASE, load_expected, predict_in_diffusers
from golden import load_case
from safetensors.torch import load_file


def test_adapters_trained_in_comfyui_predict_the_same_in_diffusers(comfyui, ran_inside, exchange):
    case, name = load_case(CASE), comfyui.path.name
    ours = predict_in_diffusers(case, exchange / f"from-{name}.safetensors")
    theirs = load_file(exchange / f"eps-{name}.safetensors")["eps"]
    assert float((ours - theirs).abs().max()) < 1e-4
    untrained = load_expected(exchange)["eps"]
    assert not torch.allclose(ours, untrained, atol=1e-3)
