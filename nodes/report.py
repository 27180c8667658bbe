"""What a node tells its user after it ran."""

from comfy_api.latest import io, ui
from server import PromptServer


def report(node: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """Show a line of text on a node, and keep it in the run's history.

    Args:
        node: The class that executes; it must ask for the hidden input ``unique_id``.
        text: The line.

    Returns:
        The node's ``ui`` output.
    """
    server = getattr(PromptServer, "instance", None)
    node_id = getattr(node.hidden, "unique_id", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
    return ui.PreviewText(text)
