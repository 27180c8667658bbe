"""For tests only: a node pack that lets ComfyUI load a tiny random Stable Diffusion 2.1.

ComfyUI recognises checkpoints by the shapes in them. This pack makes one more family known, Stable Diffusion 2.x at a
tenth of its width and with a text encoder of three layers, and writes such a checkpoint with random weights under the
names of all that the shipped workflows load. The stock loader nodes then load it; none of them is replaced.
"""

import os

import comfy.supported_models
import folder_paths
from safetensors.torch import save_file

import nodes

from .tiny_sd21 import TinySD21, tiny_checkpoint

CHECKPOINTS = (
    "v2-1_512-ema-pruned.safetensors",
    "v1-5-pruned-emaonly-fp16.safetensors",
    "sd_xl_base_1.0.safetensors",
    "sam3.1_multiplex_fp16.safetensors",
)
NODE_CLASS_MAPPINGS: dict[str, type] = {}


class AbsentLoader:
    """Stands in for a stock loader that this ComfyUI could not import.

    ComfyUI's page of 2025 cannot show any checkpoint loader where UpscaleModelLoader is absent, and that one needs
    torchvision.
    """

    RETURN_TYPES = ("UPSCALE_MODEL",)
    FUNCTION = "load"
    CATEGORY = "loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[list[str]]]]:
        return {"required": {"model_name": ([],)}}

    def load(self, model_name: str) -> None:
        raise NotImplementedError(model_name)


def _write_checkpoints() -> None:
    folder = os.path.join(folder_paths.models_dir, "checkpoints")
    os.makedirs(folder, exist_ok=True)
    first, *others = (os.path.join(folder, name) for name in CHECKPOINTS)
    if not os.path.exists(first):
        save_file(tiny_checkpoint(), first)
        for other in others:
            os.link(first, other)


if "UpscaleModelLoader" not in nodes.NODE_CLASS_MAPPINGS:
    NODE_CLASS_MAPPINGS["UpscaleModelLoader"] = AbsentLoader
comfy.supported_models.models.append(TinySD21)
_write_checkpoints()
