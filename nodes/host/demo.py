"""The demo model as ComfyUI's own classes: nothing of diffusers is needed, and no detection learns of it."""

from functools import partial
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from torch import Tensor, nn

from ...dreamcache_core.demo.files import DemoFiles, Part
from ...dreamcache_core.demo.world.world import IMAGE_SIZE
from .model import managed

MODEL_TYPES = {"epsilon": ModelType.EPS, "v_prediction": ModelType.V_PREDICTION}


class DemoLatents(comfy.latent_formats.SD15):
    """Stable Diffusion's scale of latents; previews are the demo's own."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_rgb_factors = None
        self.taesd_decoder_name = None


class DemoConfig(comfy.supported_models.SD20):
    """Stable Diffusion 2's structure at other widths; it stays out of the list that checkpoints are compared with.

    Args:
        unet: diffusers' settings of the U-Net.
        prediction: What it predicts, ``epsilon`` or ``v_prediction``.
        preview: Linear map from latents to colours, ``factors`` and ``bias``.
    """

    unet_extra_config = {"num_heads": -1, "attn_precision": torch.float32}  # noqa: RUF012
    latent_format = DemoLatents

    def __init__(self, unet: dict[str, Any], prediction: str, preview: dict[str, Any]) -> None:
        super().__init__(_ldm_unet(unet))
        self.latent_format.latent_rgb_factors = preview["factors"]
        self.latent_format.latent_rgb_factors_bias = preview["bias"]
        self.prediction = prediction

    def model_type(self, state_dict: Any, prefix: str = "") -> ModelType:  # noqa: ARG002
        """What the U-Net predicts."""
        return MODEL_TYPES[self.prediction]


class Multiple(float):
    """How many times as wide as the first a level is; ComfyUI multiplies by whole numbers alone, and 1.5 times 64 is 96."""

    def __mul__(self, channels: int) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the level's channels."""
        return round(float(self) * channels)

    __rmul__ = __mul__  # pyright: ignore[reportAssignmentType]


class DemoTextModel(comfy.clip_model.CLIPTextModel):
    """CLIP's text model with as many tokens as its settings say; ComfyUI's always has CLIP's own."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        size = (config["vocab_size"], config["hidden_size"])
        self.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))


def load_unet(files: DemoFiles, *, disable_dynamic: bool = False) -> ModelPatcher:
    """Load the demo's U-Net.

    Args:
        files: The demo model's files.
        disable_dynamic: See ``managed``.

    Returns:
        A MODEL under ComfyUI's memory management.
    """
    settings = files.config("unet")
    config = DemoConfig(settings, files.scheduler_config()["prediction_type"], files.preview())
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    weights = {names[name]: value for name, value in _read(files, "unet").items()}
    management = comfy.model_management
    device, offload_device = management.get_torch_device(), management.unet_offload_device()
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    cast = management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    model = config.get_model(weights, "").to(offload_device)
    model.side_px = IMAGE_SIZE
    _set_groups(model.diffusion_model, settings["norm_num_groups"])
    # ComfyUI's layers may take over the float type of what they load
    model.load_model_weights({name: value.to(dtype) for name, value in weights.items()}, "")
    patcher = managed(model, device, offload_device, disable_dynamic=disable_dynamic)
    patcher.cached_patcher_init = (load_unet, (files,))
    return patcher


def load_clip(files: DemoFiles) -> comfy.sd.CLIP:
    """Load the demo's text encoder and tokenizer.

    Args:
        files: The demo model's files.

    Returns:
        A CLIP under ComfyUI's memory management.
    """
    config = files.config("text_encoder")
    length, width = config["max_position_embeddings"], config["hidden_size"]
    special = {"start": "bos_token_id", "end": "eos_token_id", "pad": "pad_token_id"}
    encoder = partial(
        SDClipModel,
        max_length=length,
        textmodel_json_config=config,
        model_class=DemoTextModel,
        special_tokens={name: config[key] for name, key in special.items()},
        return_projected_pooled=False,
    )
    tokenizer = partial(SDTokenizer, str(files.tokenizer), max_length=length, embedding_size=width)
    target = comfy.supported_models_base.ClipTarget(
        partial(SD1Tokenizer, tokenizer=tokenizer), partial(SD1ClipModel, clip_model=encoder)
    )
    # transformers 5 leaves the first part of the names away
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value
        for name, value in _read(files, "text_encoder").items()
    }
    weights["text_projection.weight"] = torch.eye(width)
    clip = comfy.sd.CLIP(target, parameters=comfy.utils.calculate_parameters(weights))
    clip.load_sd(weights)
    return clip


def load_vae(files: DemoFiles) -> comfy.sd.VAE:
    """Load the demo's autoencoder.

    Args:
        files: The demo model's files.

    Returns:
        A VAE under ComfyUI's memory management.
    """
    settings = files.config("vae")
    params = {"ddconfig": _ldm_vae(settings), "embed_dim": settings["latent_channels"]}
    vae = comfy.sd.VAE(sd=_read(files, "vae"), config={"params": params})
    _set_groups(vae.first_stage_model, settings["norm_num_groups"])
    return vae


def _read(files: DemoFiles, part: Part) -> dict[str, Tensor]:
    return comfy.utils.load_torch_file(str(files.weights(part)), safe_load=True)


def _set_groups(module: nn.Module, groups: int) -> None:
    """ComfyUI builds every GroupNorm with 32 groups; the weights are the same for any number."""
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = groups


def _ldm_unet(settings: dict[str, Any]) -> dict[str, Any]:
    """Say in ComfyUI's words what diffusers' settings say."""
    widths, layers = settings["block_out_channels"], settings["layers_per_block"]
    attends = [int("CrossAttn" in kind) for kind in settings["down_block_types"]]
    return {
        "image_size": settings["sample_size"],
        "in_channels": settings["in_channels"],
        "out_channels": settings["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [Multiple(width / widths[0]) for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in attends for _ in range(layers)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in attends for _ in range(layers + 1)],
        # diffusers calls the number of heads their width
        "num_head_channels": widths[0] // settings["attention_head_dim"][0],
        "context_dim": settings["cross_attention_dim"],
        "use_linear_in_transformer": settings["use_linear_projection"],
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


def _ldm_vae(settings: dict[str, Any]) -> dict[str, Any]:
    """Say in ComfyUI's words what diffusers' settings say."""
    widths = settings["block_out_channels"]
    return {
        "double_z": True,
        "z_channels": settings["latent_channels"],
        "resolution": settings["sample_size"],
        "in_channels": settings["in_channels"],
        "out_ch": settings["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": settings["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
