"""``python -m research.templates``: write the shipped workflows."""

import json
from pathlib import Path

from .catalogue import TEMPLATES
from .workflow import Workflow

FOLDER = Path(__file__).parents[2] / "example_workflows"


def text_of(flow: Workflow) -> str:
    """A workflow's file."""
    return json.dumps(flow.to_json(), indent=1) + "\n"


if __name__ == "__main__":
    for template in TEMPLATES:
        made = template()
        (FOLDER / f"{made.name}.json").write_text(text_of(made), encoding="utf-8")
