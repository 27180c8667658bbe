"""What ships beside the code: help pages, translations, and workflows that use only what exists."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "web" / "docs"
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
LOCALES = ROOT / "locales"
LANGUAGES = ["zh", "zh-TW", "ja", "ko", "ru", "fr", "es", "pt-BR", "tr"]
PAGE_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
MOST_BYTES, MOST_BYTES_SHOWN = 200_000, 30_000


def schemas() -> dict[str, list[str]]:
    """Node ids and the names of their inputs, read from the sources of the nodes."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and name_of(call) == "Schema":
                keywords = {word.arg: word.value for word in call.keywords}
                found[ast.literal_eval(keywords["node_id"])] = inputs_in(keywords["inputs"])
    return found


def inputs_in(tree: ast.expr) -> list[str]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    first = [call.args[0] for call in calls if name_of(call) == "Input" and call.args]
    return [arg.value for arg in first if isinstance(arg, ast.Constant)]  # pyright: ignore


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def snapshot() -> dict[str, Any]:
    """Nodes, ours and the core's, as a real server described them; tests/e2e keeps the file true."""
    path = ROOT / "tests" / "e2e" / "node_snapshot.json"
    return json.loads(path.read_text(encoding="utf-8"))


def names_of(node: dict[str, Any]) -> set[str]:
    """Names of the inputs of a node of the snapshot."""
    return {given["name"] for given in node["inputs"]}


def names_in(language: str) -> dict[str, Any]:
    """What the page shows in a language: names and tooltips by node id."""
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def texts_in(tree: Any) -> list[str]:
    """All texts of a translation; the page would take ``{}|@`` in them for its own marks."""
    return (
        [tree] if isinstance(tree, str) else [text for v in tree.values() for text in texts_in(v)]
    )


SCHEMAS = schemas()


def test_the_snapshot_has_the_nodes_of_the_sources():
    nodes = snapshot()["nodes"]
    assert set(nodes) == set(SCHEMAS)
    for node_id, inputs in SCHEMAS.items():
        assert set(inputs) <= names_of(nodes[node_id]), node_id


def test_there_is_no_page_without_a_node():
    assert {path.stem for path in PAGES.glob("*.md")} == set(SCHEMAS)
    assert {path.parent.name for path in PAGES.glob("*/zh.md")} == set(SCHEMAS)


HEADINGS = {
    ".md": ("# ", "## Inputs", "**Tip**", "## Common errors"),
    "/zh.md": ("# ", "## \u8f93\u5165", "**\u63d0\u793a**", "## \u5e38\u89c1\u9519\u8bef"),
}
"""Of a node's English and Chinese page, by what follows the node's id in their names."""


@pytest.mark.parametrize("ending", HEADINGS)
@pytest.mark.parametrize("node_id", sorted(SCHEMAS))
def test_a_help_page_names_every_input(node_id, ending):
    page = (PAGES / f"{node_id}{ending}").read_text(encoding="utf-8")
    inputs = {*SCHEMAS[node_id], *names_of(snapshot()["nodes"][node_id])}
    assert [name for name in sorted(inputs) if f"**`{name}`**" not in page] == []
    for heading in HEADINGS[ending]:
        assert f"\n{heading}" in f"\n{page}", heading


def test_help_pages_show_small_images_that_are_all_there():
    pages = [path.read_text(encoding="utf-8") for path in PAGES.rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"!\[.+?\]\((.+?)\)", page)}
    assert shown == {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.webp")}
    assert all((PAGES / name).stat().st_size < MOST_BYTES_SHOWN for name in shown)


@pytest.mark.parametrize("node_id", sorted(names_in("en")))
def test_the_help_page_names_an_input_as_the_node_shows_it(node_id):
    """English names stand here and not in the schemas: a socket's own name there hides its translation."""
    page = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
    for input_id, texts in names_in("en")[node_id].get("inputs", {}).items():
        assert f"**`{input_id}`** (*{texts['name']}*" in page
    assert set(names_in("en")[node_id].get("inputs", {})) <= names_of(snapshot()["nodes"][node_id])


def test_there_is_no_translation_that_the_page_would_not_show():
    assert {path.name for path in LOCALES.iterdir()} == {"en", *LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_names_every_node_input_and_output(language):
    translated, nodes = names_in(language), snapshot()["nodes"]
    assert set(translated) == set(nodes)
    for node_id, texts in translated.items():
        assert texts["display_name"]
        assert texts["description"]
        inputs, outputs = texts.get("inputs", {}), texts.get("outputs", {})
        assert set(inputs) == names_of(nodes[node_id]), node_id
        assert list(outputs) == [str(i) for i in range(len(nodes[node_id]["outputs"]))], node_id
        for slot in (*inputs.values(), *outputs.values()):
            assert slot["name"], node_id
            assert slot["tooltip"], node_id
    assert [text for text in texts_in(translated) if set(text) & set("{}|@")] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_uses_only_nodes_and_inputs_that_exist(path):
    recorded = snapshot()
    known = {**recorded["stock_nodes"], **recorded["nodes"]}
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        names = names_of(known[node["type"]])
        assert {slot["name"] for slot in node["inputs"]} <= names, node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_links_of_a_workflow_fit_its_nodes(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    for link, source, output, target, slot, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == link
        assert nodes[target]["inputs"][slot]["type"] == kind


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_a_small_thumbnail(path):
    image = path.with_suffix(".jpg").read_bytes()
    assert image.startswith(b"\xff\xd8")
    assert len(image) < MOST_BYTES
