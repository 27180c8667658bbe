"""What a node tells its user after it ran."""

import functools
import html
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...dreamcache_core import AdapterSet, DreamCacheError, InputError
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
    """One line on adapters: for which models, and whether they were trained at all."""
    info = adapters.info
    family = f"for {info.layout.describe()}"
    if FITTED not in info.extra:
        return family
    name = info.base_model or "a model"
    return f"{family}, fitted to {name}, not trained: connect them to Encode Reference too (or set its timestep to {info.timestep})"


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


def shows_errors(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Let a node show on itself what goes wrong in it, see ``without_path``, and check its numbers; returns the node."""
    execute: Any = node.execute.__func__

    @functools.wraps(execute)
    def run(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        try:
            _check_numbers(_ranges(node), kwargs)
            return execute(cls, *args, **kwargs)
        except DreamCacheError as error:
            context = get_executing_context()
            show(str(error), context and context.node_id)
            raise without_path(error) from error

    node.execute = classmethod(run)
    return node


@functools.cache
def _ranges(node: type[io.ComfyNode]) -> list[tuple[str, float, float]]:
    """Name, least and greatest value of a node's numbers."""
    inputs = node.define_schema().inputs
    return [
        (each.id, each.min, each.max)
        for each in inputs
        if isinstance(each, io.Int.Input | io.Float.Input)
    ]


def _check_numbers(ranges: Sequence[tuple[str, float, float]], given: Mapping[str, Any]) -> None:
    """Refuse numbers out of range, as ComfyUI does where they are typed in, but not where they come by a link."""
    for name, low, high in ranges:
        value = given.get(name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not low <= number <= high:
                raise InputError(
                    f"Expected {name} in {low} ... {high}, got {number}. Look at what is connected to it."
                )


def without_path(error: DreamCacheError) -> DreamCacheError:
    """Return an error of the same kind and words that ComfyUI shows by its plain name.

    ComfyUI writes the module of an error in front of it, which is this pack's folder; of built-in ones it leaves that out.
    """
    kind = type(error)
    return type(kind.__name__, (kind,), {"__module__": "builtins"})(str(error))


def node_id(node: type[io.ComfyNode]) -> str | None:
    """Id of a node in the graph that executes; ``None`` where it is executed without one."""
    return getattr(node.hidden, "unique_id", None)
