"""What a node tells its user after it ran."""

import sys

from comfy_api.latest import io, ui


def report(node: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """Show a line of text on a node, and keep it in the run's history.

    Args:
        node: The class that executes; it must ask for the hidden input ``unique_id``.
        text: The line.

    Returns:
        The node's ``ui`` output.
    """
    # graphs can also be executed without a server, which is then not imported
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and (executing := node_id(node)) is not None:
        server.send_progress_text(text, executing)
    return ui.PreviewText(text)


def node_id(node: type[io.ComfyNode]) -> str | None:
    """Id of a node in the graph that executes; ``None`` where it is executed without one."""
    return getattr(node.hidden, "unique_id", None)
