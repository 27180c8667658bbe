"""What is recorded of each node: its inputs in their order, and its outputs."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).parents[2] / "tests" / "e2e" / "node_snapshot.json"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
MARKDOWN = {
    "inputs": [{"name": "text", "type": "STRING", "default": "", "multiline": True}],
    "outputs": [],
    "output_node": False,
}

Json = dict[str, Any]


@cache
def definitions() -> Json:
    """Nodes by id, as ComfyUI's server described them, and the page's own note."""
    recorded = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return {**recorded["stock_nodes"], **recorded["nodes"], "MarkdownNote": MARKDOWN}


def is_widget(given: Json) -> bool:
    """Whether an input has a value of its own."""
    return given["type"] in WIDGETS and not given.get("forceInput")


def values_of(given: Json, value: Any) -> Iterator[Any]:
    """What a file keeps of a widget: the page puts a second one behind seeds and uploads."""
    yield value
    if given.get("control_after_generate"):
        # a number on its own serves several samplers, which are compared
        yield "fixed" if given["name"] == "value" else "randomize"
    if given.get("image_upload"):
        yield "image"
