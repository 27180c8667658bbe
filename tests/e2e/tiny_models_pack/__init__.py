"""For tests only: a node pack that lets ComfyUI load a tiny random Stable Diffusion 2.1.

ComfyUI recognises checkpoints by the shapes in them. This pack makes one more family known, Stable Diffusion 2.x at a
tenth of its width and with a text encoder of three layers, and writes such a checkpoint with random weights under the
name of the real one. The stock loader nodes then load it; no node is added or replaced.
"""

import os

import comfy.supported_models
import folder_paths

from .tiny_sd21 import TinySD21, tiny_checkpoint

CHECKPOINT = "v2-1_512-ema-pruned.safetensors"
NODE_CLASS_MAPPINGS: dict[str, type] = {}

comfy.supported_models.models.append(TinySD21)


def _write_checkpoint() -> None:
    from safetensors.torch import save_file

    folder = os.path.join(folder_paths.models_dir, "checkpoints")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, CHECKPOINT)
    if not os.path.exists(path):
        save_file(tiny_checkpoint(), path)


_write_checkpoint()
