"""Stable Diffusion 2.1's structure, small: U-Net of 32 channels, text encoder of three layers, TAESD as the VAE."""

from typing import Any

import comfy.clip_model
import comfy.supported_models
import comfy.taesd.taesd
import torch
from comfy.sd1_clip import SD1ClipModel, SDClipModel
from comfy.text_encoders.sd2_clip import SD2Tokenizer
from torch import Tensor, nn

VOCABULARY = 512
IMAGE_CHANNELS = (3,)
TEXT_CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": True,
    "context_dim": 1024,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}


class HashedEmbedding(nn.Module):
    """Token embedding with few rows: tokens share them."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.rows = embedding

    @property
    def weight(self) -> Tensor:
        return self.rows.weight

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.rows(tokens % VOCABULARY, **options)


class TinyTextModel(comfy.clip_model.CLIPTextModel):
    """OpenCLIP-H's text model with few layers and few tokens."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        width = config["hidden_size"]
        rows = operations.Embedding(VOCABULARY, width, dtype=dtype, device=device)
        self.set_input_embeddings(HashedEmbedding(rows))


class TinyClipH(SDClipModel):
    """The text encoder with Stable Diffusion 2.x's settings: last but one layer, padded with 0."""

    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device,
            layer="hidden",
            layer_idx=-2,
            textmodel_json_config=dict(TEXT_CONFIG),
            dtype=dtype,
            model_class=TinyTextModel,
            special_tokens={"start": 49406, "end": 49407, "pad": 0},
            model_options=model_options or {},
        )


class TinyClip(SD1ClipModel):
    """The container that ComfyUI expects around a text encoder."""

    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(device, dtype, model_options or {}, clip_name="h", clip_model=TinyClipH)


class TinySD21(comfy.supported_models.SD20):
    """Stable Diffusion 2.x at a tenth of its width; recognised by its 32 channels."""

    unet_config = {**comfy.supported_models.SD20.unet_config, "model_channels": 32}  # noqa: RUF012
    unet_extra_config = {  # noqa: RUF012
        **comfy.supported_models.SD20.unet_extra_config,
        "num_head_channels": 16,
    }

    def clip_target(self, state_dict: Any = None) -> Any:
        return comfy.supported_models.supported_models_base.ClipTarget(SD2Tokenizer, TinyClip)


def tiny_checkpoint() -> dict[str, Tensor]:
    """Random weights of all three parts under the names of a Stable Diffusion 2.1 checkpoint, float16."""
    config = TinySD21(dict(UNET_CONFIG))
    config.set_inference_dtype(torch.float32, None)
    parts = {
        "model.diffusion_model.": config.get_model({}, "", device="cpu").diffusion_model,
        "cond_stage_model.model.": TinyClip().clip_h,
        "first_stage_model.": comfy.taesd.taesd.TAESD(),
    }
    generator = torch.Generator().manual_seed(0)
    return {
        f"{prefix}{name}": _weight(name, tensor, generator).half()
        for prefix, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def _weight(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Values that keep activations near one: norms near identity, small biases, a VAE of small residues."""
    if tensor.ndim == 0:
        return torch.tensor({"vae_scale": 1.0}.get(name, 0.0))
    normal = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim > 1:
        gain = 0.1 if name.endswith("conv.4.weight") else 1.0
        return gain * normal / tensor[0].numel() ** 0.5
    if name.endswith("weight"):
        return 1 + 0.1 * normal
    return 0.02 * normal + (0.5 if tuple(tensor.shape) == IMAGE_CHANNELS else 0.0)
