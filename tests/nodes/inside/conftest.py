"""Runs in ComfyUI's interpreter: ComfyUI comes first on the path, the pack is loaded as ComfyUI does."""

import asyncio
import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

COMFYUI = os.environ["COMFYUI_FOLDER"]
PACK = Path(__file__).parents[3]
sys.path.insert(0, COMFYUI)
sys.argv = ["main.py", "--cpu", "--base-directory", os.environ["COMFYUI_BASE"]]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import nodes as comfy_nodes  # noqa: E402

torch.set_num_threads(1)  # the models are tiny
for folder in ("input", "output", "temp", "models", "custom_nodes", "user"):
    Path(os.environ["COMFYUI_BASE"], folder).mkdir(exist_ok=True)
assert asyncio.run(comfy_nodes.load_custom_node(str(PACK))), "ComfyUI could not load the pack"
if CAPACITY := os.environ.get("COMFYUI_DYNAMIC_VRAM"):
    import dynamic_vram

    dynamic_vram.enable(int(CAPACITY))
else:
    collect_ignore = ["test_dynamic_vram.py"]
gc.freeze()  # what is loaded by now stays: it need not be looked through after every test


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI executes nodes in inference mode."""
    with torch.inference_mode():
        yield
    gc.collect()  # ComfyUI's unloading stumbles over models that are collected while it runs
    comfy.model_management.unload_all_models()


class Page:
    """Stands for the browser's page: keeps what a node shows."""

    def __init__(self):
        self.texts = []

    def send_progress_text(self, text, node_id):
        self.texts.append((node_id, text))


@pytest.fixture
def page(monkeypatch):
    shown = Page()
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=shown))
    monkeypatch.setitem(sys.modules, "server", server)
    return shown
