"""Random models in ComfyUI's own structures."""

import sys
from typing import Any

from .host import loaded_core

SMALLEST_LATENT = 8
SMALLEST = {
    "widths": [32, 64, 128, 128],
    "heads": [1, 2, 4, 4],
    "text_width": 32,
    "linear_projection": True,
    "vae_width": 32,
    "dtype": "float32",
}
"""Latents and model whose arithmetic takes no time beside the Python that asks for it."""


def make_model(size: dict[str, Any]) -> Any:
    """A MODEL of Stable Diffusion 2's structure, or without ``linear_projection`` 1's, with random weights."""
    import comfy.model_management
    import comfy.supported_models
    import torch
    from comfy.model_patcher import ModelPatcher

    widths, heads = size["widths"], size["heads"]
    if size["linear_projection"]:
        base = comfy.supported_models.SD20
        own = {"num_head_channels": widths[0] // heads[0], "num_heads": -1}
        own["attn_precision"] = torch.float32
    else:
        base = comfy.supported_models.SD15
        own = {"num_head_channels": -1, "num_heads": heads[0]}

    class Config(base):
        unet_extra_config = own

        def model_type(self, state_dict: Any, prefix: str = "") -> Any:  # noqa: ARG002
            return comfy.model_base.ModelType.EPS

    config = Config(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": widths[0],
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [width // widths[0] for width in widths],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "use_spatial_transformer": True,
            "use_linear_in_transformer": size["linear_projection"],
            "context_dim": size["text_width"],
            "legacy": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
        }
    )
    device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(getattr(torch, size["dtype"]), None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    fill_weights(model.diffusion_model)
    return ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def make_vae(width: int) -> Any:
    """A VAE of Stable Diffusion's structure with random weights; ``width``: channels of its first level."""
    import comfy.sd

    structure = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": width,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    vae = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": structure, "embed_dim": 4}})
    fill_weights(vae.first_stage_model)
    return vae


def fill_weights(module: Any) -> None:
    """Give a module random weights, as ComfyUI leaves them unset."""
    import torch

    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
            else:
                weight.zero_()


def make_adapters(model: Any) -> Any:
    """Adapters with random weights."""
    import torch

    core = loaded_core()
    layout = sys.modules[f"{core.__name__}.method.backends"].layout_of(model.model.diffusion_model)
    with torch.inference_mode(False), torch.no_grad():
        adapters = core.AdapterSet(core.AdapterInfo(layout))
        for layer in adapters.layers:
            torch.nn.init.normal_(adapters[layer].merge.weight, std=0.02)
    return adapters


def random_text(model: Any) -> list[Any]:
    """A CONDITIONING of a prompt's size."""
    import torch

    width = model.model.model_config.unet_config["context_dim"]
    return [[torch.randn(1, 77, width), {"pooled_output": None}]]
