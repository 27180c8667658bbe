"""The cached layers of ComfyUI's real, full-size U-Nets; on the meta device, so without memory."""

import comfy.model_detection
import comfy.ops
import comfy.supported_models
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from tiny import CORE, PATCHES, pack_module

COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
}
SD = {
    **COMMON,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}
SDXL = {
    **COMMON,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
SD_LAYERS = {
    "middle_block.1": 1280,
    "output_blocks.4.1": 1280,
    "output_blocks.6.1": 640,
    "output_blocks.8.1": 640,
    "output_blocks.10.1": 320,
}
SDXL_LAYERS = {
    "middle_block.1": 1280,
    "output_blocks.1.1": 1280,
    "output_blocks.3.1": 640,
    "output_blocks.5.1": 640,
}


@pytest.mark.parametrize(
    ("family", "config", "width", "linear", "layers", "parameters"),
    [
        ("sd15", SD, 768, False, SD_LAYERS, 25_207_040),
        ("sd21", SD, 1024, True, SD_LAYERS, 25_207_040),
        ("sdxl", SDXL, 2048, True, SDXL_LAYERS, 24_591_360),
    ],
    ids=["sd15", "sd21", "sdxl"],
)
def test_full_size_unets_have_the_layers_of_the_method(
    family, config, width, linear, layers, parameters
):
    unet = UNetModel(
        **config,
        context_dim=width,
        use_linear_in_transformer=linear,
        num_head_channels=64,
        device="meta",
        operations=comfy.ops.disable_weight_init,
    )
    backends = pack_module("dreamcache_core.method.backends")
    layout = backends.layout_of(unet)
    assert layout.family == family
    assert list(layout.channels.items()) == list(layers.items())
    with torch.device("meta"):
        adapters = CORE.AdapterSet(CORE.AdapterInfo(layout))
    assert adapters.num_parameters == parameters
    assert [PATCHES.block_id(layer)[1] for layer in layers] == [
        0 if layer == "middle_block.1" else int(layer.split(".")[1]) for layer in layers
    ]
