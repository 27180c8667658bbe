"""Nodes that load adapters."""

from comfy_api.latest import io

from ..dreamcache_core import load_adapters
from .folders import adapter_path, file_state, list_adapter_files
from .report import report
from .types import Adapters


class LoadAdapters(io.ComfyNode):
    """Load adapters from ``models/dreamcache``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheLoadAdapters",
            display_name="Load DreamCache Adapters",
            category="DreamCache",
            description="Loads trained DreamCache adapters. They must have been trained for the model you use: the "
            "released ones fit Stable Diffusion 2.1-base (512 px).",
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
    def fingerprint_inputs(cls, adapters: str) -> str:
        """Run again when the file changes."""
        return file_state(adapter_path(adapters))

    @classmethod
    def execute(cls, adapters: str) -> io.NodeOutput:
        """Load the file."""
        loaded = load_adapters(adapter_path(adapters))
        layout = loaded.info.layout
        count = f"{loaded.num_parameters / 1e6:.1f} M parameters, {len(loaded)} layers"
        text = f"{count}, {layout.describe()}"
        return io.NodeOutput(loaded, ui=report(cls, text))


NODES: list[type[io.ComfyNode]] = [LoadAdapters]
