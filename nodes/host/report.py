"""What a node tells its user after it ran."""

import html
import sys

from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ...dreamcache_core import AdapterSet
from ...dreamcache_core.fitting.fit import FITTED
from ...dreamcache_core.images.tensors import tensor_to_image
from ...dreamcache_core.names import printable

PREVIEW_PX = 512


def report(node: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """Show a line of text on a node, and keep it in the run's history.

    Args:
        node: The class that executes; it must ask for the hidden input ``unique_id``.
        text: The line.

    Returns:
        The node's ``ui`` output.
    """
    text = printable(text)
    show(text, node_id(node))
    return ui.PreviewText(text)


def describe_adapters(adapters: AdapterSet) -> str:
    """One line on adapters: how large, for which models, and whether they were trained at all."""
    info = adapters.info
    size = f"{adapters.num_parameters / 1e6:.1f} M parameters, {len(adapters)} layers, {info.layout.describe()}"
    if FITTED not in info.extra:
        return size
    name = info.base_model or "a model"
    return f"fitted to {name}, not trained: connect them to Encode Reference too (or set its timestep to {info.timestep}). {size}"


def preview(image: Tensor) -> tuple[str, Image.Image, int]:
    """What ComfyUI's progress bar takes as a preview, of (1, height, width, 3)."""
    return ("JPEG", tensor_to_image(image), PREVIEW_PX)


def show(text: str, node: str | None) -> None:
    """Show a line of text on the node of an id, until it executes again; nothing without an id or a server."""
    # graphs can also be executed without a server, which is then not imported
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node is not None:
        # older pages put it into their HTML as it is
        server.send_progress_text(html.escape(text), node)


def node_id(node: type[io.ComfyNode]) -> str | None:
    """Id of a node in the graph that executes; ``None`` where it is executed without one."""
    return getattr(node.hidden, "unique_id", None)
