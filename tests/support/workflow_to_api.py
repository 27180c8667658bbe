"""Turn a workflow as ComfyUI's page saves it into the prompt that its server runs.

Needs the answer of ``/object_info``: the saved file lists widget values without names.
"""

from collections.abc import Iterator
from typing import Any

NOTES = {"Note", "MarkdownNote"}
PAGE_ONLY = NOTES | {"Reroute", "PrimitiveNode"}
MUTED, BYPASSED = 2, 4
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}

Json = dict[str, Any]


def workflow_to_api(workflow: Json, object_info: Json) -> Json:
    """Convert one workflow.

    Args:
        workflow: The file's content: ``nodes`` and ``links`` (version 0.4).
        object_info: The server's description of its nodes, by class.

    Returns:
        ``{node id: {"class_type": ..., "inputs": {name: value or [node id, output]}}}`` for every node that the
        server runs: notes and muted nodes are left out, bypassed nodes, reroutes and primitives are replaced by what
        stands behind them.

    Raises:
        KeyError: A node's class is not known to the server.
    """
    return _Converter(workflow, object_info).convert()


def missing_classes(workflow: Json, object_info: Json) -> set[str]:
    """Classes of the workflow that neither server nor page know."""
    return {node["type"] for node in workflow["nodes"]} - set(object_info) - PAGE_ONLY


def widget_names(info: Json) -> Iterator[tuple[str, int]]:
    """Yield the widgets of a class in the file's order, each with the number of values that it takes.

    A seed is followed by what happens to it after queueing, an upload by the kind of file.
    """
    for group in ("required", "optional"):
        inputs = info["input"].get(group, {})
        for name in info.get("input_order", {}).get(group, list(inputs)):
            kind, *rest = inputs[name]
            options = rest[0] if rest else {}
            if (not isinstance(kind, list) and kind not in WIDGET_TYPES) or options.get(
                "forceInput"
            ):
                continue
            is_seed = kind == "INT" and options.get(
                "control_after_generate", name in ("seed", "noise_seed")
            )
            yield name, 1 + bool(is_seed) + bool(options.get("image_upload"))


class _Converter:
    def __init__(self, workflow: Json, object_info: Json) -> None:
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.sources = {link[0]: (link[1], link[2]) for link in workflow["links"]}
        self.object_info = object_info

    def convert(self) -> Json:
        return {
            str(node["id"]): {"class_type": node["type"], "inputs": self._inputs(node)}
            for node in self.nodes.values()
            if node["type"] not in PAGE_ONLY and node.get("mode", 0) not in (MUTED, BYPASSED)
        }

    def _inputs(self, node: Json) -> Json:
        values = self._widget_values(node)
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                values.pop(slot["name"], None)
                source = self._source(slot["link"])
                if source is not None:
                    values[slot["name"]] = source
        return values

    def _widget_values(self, node: Json) -> Json:
        saved = node.get("widgets_values") or []
        if isinstance(saved, dict):
            return dict(saved)
        values: Json = {}
        position = 0
        for name, width in widget_names(self.object_info[node["type"]]):
            if position < len(saved):
                values[name] = saved[position]
            position += width
        return values

    def _source(self, link: int) -> Any:
        """What an input sees: ``[node id, output]``, a primitive's value, or ``None`` behind a muted node."""
        node_id, output = self.sources[link]
        node = self.nodes[node_id]
        if node["type"] == "PrimitiveNode":
            return node["widgets_values"][0]
        if node.get("mode", 0) == MUTED:
            return None
        if node["type"] == "Reroute" or node.get("mode", 0) == BYPASSED:
            return self._behind(node, output)
        return [str(node_id), output]

    def _behind(self, node: Json, output: int) -> Any:
        """Follow a node that passes things on: from an output to the first linked input of its type."""
        kind = node["outputs"][output]["type"]
        for slot in node.get("inputs", []):
            if slot.get("link") is not None and (slot["type"] == kind or node["type"] == "Reroute"):
                return self._source(slot["link"])
        return None
