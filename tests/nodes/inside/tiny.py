"""Tiny real ComfyUI models, conditionings and adapters; and shortcuts to run nodes."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.cldm.cldm
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher

import nodes as comfy_nodes

CPU = torch.device("cpu")
IS_DYNAMIC = "COMFYUI_DYNAMIC_VRAM" in os.environ
CORE = next(module for name, module in sys.modules.items() if name.endswith(".dreamcache_core"))


def pack_module(name: str) -> Any:
    """A module of the pack as ComfyUI has loaded it: ``nodes.host.gates``, ``dreamcache_core.method.layers``."""
    return importlib.import_module(f"{CORE.__name__.rpartition('.')[0]}.{name}")


APPLIED, GATES, MODEL, PATCHES, RUN, WRAPPERS = (
    pack_module(f"nodes.host.{file}")
    for file in ("applied", "gates", "model", "unet.patches", "run", "wrappers")
)

SD = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "sd15": (
        comfy.supported_models.SD15,
        {**SD, "use_linear_in_transformer": False, "context_dim": 768},
        {"num_heads": 4, "num_head_channels": -1},
    ),
    "sd21": (
        comfy.supported_models.SD20,
        {**SD, "use_linear_in_transformer": True, "context_dim": 1024},
        {"num_heads": -1, "num_head_channels": 16, "attn_precision": torch.float32},
    ),
    "sdxl": (
        comfy.supported_models.SDXL,
        {
            **SD,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 3, 3],
            "transformer_depth_middle": 3,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
            "use_linear_in_transformer": True,
            "context_dim": 2048,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
        },
        {"num_heads": -1, "num_head_channels": 16},
    ),
}


def make_model(
    kind: str = "sd15",
    *,
    dtype: torch.dtype = torch.float32,
    manual_cast: torch.dtype | None = None,
    in_file: torch.dtype | None = None,
    seed: int = 0,
    **changes: Any,
) -> ModelPatcher:
    """A MODEL with a tiny U-Net of the kind's structure and random weights, as a loader makes it.

    ``in_file`` is the weights' float type before they are loaded; ``None``: as ``dtype``.
    """
    config = _config(kind, changes)
    config.set_inference_dtype(dtype, manual_cast)
    known = (kind, seed, repr(changes))
    if known not in _weights:
        _weights[known] = _random_weights(kind, seed, changes)
    weights = {
        name: value.to(in_file or dtype, copy=True) for name, value in _weights[known].items()
    }

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        return new_patcher(config, weights, disable_dynamic=disable_dynamic)

    model = load()
    model.cached_patcher_init = (load, ())
    return model


def new_patcher(
    config: Any, weights: dict[str, torch.Tensor], *, disable_dynamic: bool = False
) -> ModelPatcher:
    """Load a U-Net's weights as ComfyUI does."""
    model = config.get_model({}, "", device=CPU)
    kind = (
        ModelPatcher
        if disable_dynamic
        else getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    )
    patcher = kind(model, load_device=comfy.model_management.get_torch_device(), offload_device=CPU)
    # with dynamic VRAM the weights of the file become the model's
    model.diffusion_model.load_state_dict(weights, assign=IS_DYNAMIC and not disable_dynamic)
    return patcher


_weights: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}
"""Random weights by kind, seed and changes: they are made once."""


def _config(kind: str, changes: dict[str, Any]) -> Any:
    base, unet_config, extra = KINDS[kind]
    config_class = type(
        f"Tiny{base.__name__}", (base,), {"unet_extra_config": {**base.unet_extra_config, **extra}}
    )
    return config_class({**unet_config, **changes})


def _random_weights(kind: str, seed: int, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    config = _config(kind, changes)
    config.set_inference_dtype(torch.float32, None)
    with _allocated():
        unet = config.get_model({}, "", device=CPU).diffusion_model
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _weight(name, parameter, generator) for name, parameter in unet.named_parameters()
    }


@contextmanager
def _allocated() -> Iterator[None]:
    """Let layers have weights before any are loaded: with dynamic VRAM they have none."""
    if not IS_DYNAMIC:
        yield
        return
    comfy.memory_management.aimdo_enabled = False
    try:
        yield
    finally:
        comfy.memory_management.aimdo_enabled = True


def _weight(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim > 1:
        return normal / parameter[0].numel() ** 0.5
    return 1 + 0.1 * normal if name.endswith("weight") else 0.02 * normal


def make_controlnet() -> Any:
    """A ControlNet of the tiny U-Net's structure, random weights, zero convolutions included."""
    config = {k: v for k, v in SD.items() if k not in ("out_channels", "transformer_depth_output")}
    with _allocated():
        network = comfy.cldm.cldm.ControlNet(
            **config,
            hint_channels=3,
            num_heads=4,
            use_linear_in_transformer=False,
            context_dim=768,
            device=CPU,
        )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(_weight(name, parameter, generator))
    return network


def load_weights(model: ModelPatcher, weights: dict[str, torch.Tensor]) -> ModelPatcher:
    model.model.diffusion_model.load_state_dict(weights)
    return model


def lora_weights() -> dict[str, torch.Tensor]:
    """A LoRA on an attention that DreamCache acts on and on one that it leaves alone."""
    generator = torch.Generator().manual_seed(9)
    weights: dict[str, torch.Tensor] = {}
    for block in ("middle_block_1", "output_blocks_5_1"):
        name = f"lora_unet_{block}_transformer_blocks_0_attn1_to_v"
        weights[f"{name}.lora_up.weight"] = torch.randn((128, 4), generator=generator) * 0.2
        weights[f"{name}.lora_down.weight"] = torch.randn((4, 128), generator=generator) * 0.2
    return weights


def make_text(model: ModelPatcher, seed: int, tokens: int = 7) -> list[Any]:
    """A CONDITIONING of random text states for the model."""
    generator = torch.Generator().manual_seed(seed)
    width = model.model.model_config.unet_config["context_dim"]
    states = torch.randn((1, tokens, width), generator=generator)
    return [[states, {"pooled_output": torch.randn((1, 1280), generator=generator)}]]


def make_adapters(model: ModelPatcher, seed: int = 0, layers: Any = None, **info: Any) -> Any:
    """Random adapters that change the image visibly."""
    layout = MODEL.model_layout(model, layers)
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(seed)
        adapters = CORE.AdapterSet(CORE.AdapterInfo(layout, **info)).requires_grad_(False)
        for layer in adapters:
            for parameter in adapters[layer].parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
    return adapters


class FlatVAE:
    """A VAE that pools pixels: what the nodes need of a VAE, and exact to reason about."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([pooled, pooled.mean(dim=1, keepdim=True)], dim=1) * 2 - 1


def make_image(seed: int = 0, height: int = 128, width: int = 128, batch: int = 1) -> torch.Tensor:
    coarse = torch.rand((batch, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").movedim(
        1, -1
    )


def run(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """Execute a node with its defaults, as a graph with these inputs would."""
    return execute(node_id, **inputs).result


def execute(node_id: str, **inputs: Any) -> Any:
    """As ``run``, for what a node shows too."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS[node_id]
    defaults = {
        item.id: item.default
        for item in node.define_schema().inputs
        if getattr(item, "default", None) is not None
    }
    return node.execute(**{**defaults, **inputs})


def run_options(node_id: str, name: str = "reference") -> list[str]:
    """What a node's combo lists now."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS[node_id]
    return next(item for item in node.define_schema().inputs if item.id == name).options


def said(node_id: str, **inputs: Any) -> str:
    """What a node shows as text."""
    shown = execute(node_id, **inputs).ui
    return (shown if isinstance(shown, dict) else shown.as_dict())["text"][0]


def encode(
    model: ModelPatcher, seed: int = 0, image: torch.Tensor | None = None, **inputs: Any
) -> Any:
    given = make_image(seed) if image is None else image
    return run(
        "DreamCacheEncode",
        model=model,
        vae=FlatVAE(),
        image=given,
        conditioning=make_text(model, 100),
        **inputs,
    )[0]


def apply(
    model: ModelPatcher, adapters: Any = None, reference: Any = None, **inputs: Any
) -> ModelPatcher:
    return _apply(model, adapters, reference, **inputs).result[0]


def said_by_apply(
    model: ModelPatcher, adapters: Any = None, reference: Any = None, **inputs: Any
) -> str:
    return _apply(model, adapters, reference, **inputs).ui.as_dict()["text"][0]


def _apply(model: ModelPatcher, adapters: Any, reference: Any, **inputs: Any) -> Any:
    adapters = make_adapters(model) if adapters is None else adapters
    reference = encode(model) if reference is None else reference
    # three predictions a step: more can go wrong with them than with the default's two
    inputs = {"image_guidance": 0.4, **inputs}
    return execute("DreamCacheApply", model=model, adapters=adapters, reference=reference, **inputs)


def sample(
    model: ModelPatcher,
    *,
    cfg: float = 7.5,
    steps: int = 3,
    sampler: str = "euler",
    scheduler: str = "normal",
    positive: Any = None,
    negative: Any = None,
    size: tuple[int, int] = (16, 16),
    batch: int = 1,
    seed: int = 5,
    denoise: float = 1.0,
    latent: torch.Tensor | None = None,
    noise_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What KSampler does."""
    latent = torch.zeros((batch, 4, *size)) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        make_text(model, 1) if positive is None else positive,
        make_text(model, 2) if negative is None else negative,
        latent,
        denoise=denoise,
        noise_mask=noise_mask,
        disable_pbar=True,
        seed=seed,
    )


class CallCounter:
    """Counts the U-Net's calls and the rows of each, by a hook on the real module."""

    def __init__(self, model: ModelPatcher) -> None:
        self.rows: list[int] = []
        self.unet = model.model.diffusion_model

    def __enter__(self) -> "CallCounter":
        self.hook = self.unet.register_forward_pre_hook(
            lambda _, args: self.rows.append(len(args[0]))
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-5) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= relative, f"relative error {error:.2e} > {relative:.0e}"
