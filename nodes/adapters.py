"""Nodes that load, save and fit adapters."""

from typing import Any

import torch
from comfy_api.latest import io

from ..dreamcache_core import AdapterSet, InputError, load_adapters, save_adapters
from ..dreamcache_core.method.cache import LATENT_FACTOR
from .host.folders import (
    adapter_path,
    check_choice,
    choice_state,
    list_adapter_files,
    new_adapter_path,
)
from .host.model import default_side_px
from .host.report import describe_adapters, node_id, report
from .host.training.fit import fit_to_model
from .host.training.run import MAX_PX, MIN_PX
from .sockets import PERSONALIZE, Adapters, advanced, filename_prefix_input, found_by, seed_input

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class LoadAdapters(io.ComfyNode):
    """Load adapters from ``models/dreamcache``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheLoadAdapters",
            display_name="Load DreamCache Adapters",
            category="DreamCache",
            description="Loads trained DreamCache adapters: they let a model look at a reference. They must have been trained for "
            "the model you use; the released ones fit Stable Diffusion 2.1-base (512 px).",
            **found_by(*PERSONALIZE),
            inputs=[
                io.Combo.Input(
                    "adapters",
                    options=list_adapter_files(),
                    tooltip="Adapter file in models/dreamcache (.safetensors, or the released .pt). Nothing listed? Put a "
                    "file there and press R.",
                ),
            ],
            outputs=[Adapters.Output(display_name="adapters", tooltip="For Apply DreamCache.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, adapters: str | None = None) -> bool | str:
        """Say where adapters belong when the file is not there."""
        return check_choice(adapter_path, adapters)

    @classmethod
    def fingerprint_inputs(cls, adapters: str | None) -> str:
        """Run again when the file changes."""
        return choice_state(adapter_path, adapters)

    @classmethod
    def execute(cls, adapters: str) -> io.NodeOutput:
        """Load the file."""
        loaded = load_adapters(adapter_path(adapters))
        return io.NodeOutput(loaded, ui=report(cls, describe_adapters(loaded)))


class SaveAdapters(io.ComfyNode):
    """Write adapters into ``models/dreamcache``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheSaveAdapters",
            display_name="Save DreamCache Adapters",
            category="DreamCache/training",
            description="Saves adapters into models/dreamcache, where Load DreamCache Adapters lists them after R.",
            **found_by("export adapters", "personalize", "personalise", "dreambooth"),
            inputs=[
                Adapters.Input(
                    "adapters", tooltip="From Train DreamCache Adapters or Adapters from Model."
                ),
                filename_prefix_input("my_adapters"),
                advanced(
                    io.Combo.Input(
                        "dtype",
                        options=list(DTYPES),
                        default="float32",
                        optional=True,
                        tooltip="float16 halves the file (50 MB instead of 100 for Stable Diffusion); images look the same. "
                        "float32 is better to train on from.",
                    )
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, adapters: AdapterSet, filename_prefix: str, dtype: str = "float32"
    ) -> io.NodeOutput:
        """Save them under a new name."""
        with new_adapter_path(filename_prefix) as path:
            save_adapters(adapters, path, dtype=DTYPES[dtype])
        text = f"{path}: {adapters.info.layout.describe()}"
        return io.NodeOutput(ui=report(cls, text))


class ModelAdapters(io.ComfyNode):
    """Fit adapters to a model, without training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheModelAdapters",
            display_name="Adapters from Model (DreamCache)",
            category="DreamCache",
            description="Makes adapters of the model's own self-attention: for any Stable Diffusion 1.5, 2.1 or SDXL model, "
            "without a file and without training. Trained adapters keep more of the subject.",
            **found_by("no download", *PERSONALIZE),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that will generate; LoRAs on it count. It stays as it is.",
                ),
                io.Clip.Input("clip", tooltip="The model's CLIP."),
                advanced(
                    seed_input(
                        "The same model and seed give the same adapters. Another one hardly differs."
                    )
                ),
                advanced(
                    io.Int.Input(
                        "size",
                        default=0,
                        min=0,
                        max=MAX_PX,
                        step=8,
                        optional=True,
                        tooltip="Side in pixels of the images that the model draws for it. 0: 512, for SDXL 1024.",
                    )
                ),
            ],
            outputs=[
                Adapters.Output(
                    display_name="adapters",
                    tooltip="For Apply DreamCache, Save DreamCache Adapters, or to train on from. Encode Reference must have "
                    "their timestep.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, seed: int, size: int = 0) -> io.NodeOutput:
        """Fit."""
        size_px = size or default_side_px(model)
        if size_px < MIN_PX or size_px % LATENT_FACTOR:
            raise InputError(
                f"size must be 0 or a multiple of {LATENT_FACTOR} from {MIN_PX} on; given {size}."
            )
        adapters = fit_to_model(model, clip, size_px=size_px, seed=seed, node_id=node_id(cls))
        return io.NodeOutput(adapters, ui=report(cls, describe_adapters(adapters)))


NODES: list[type[io.ComfyNode]] = [LoadAdapters, SaveAdapters, ModelAdapters]
