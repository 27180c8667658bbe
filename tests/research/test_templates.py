"""The shipped workflows are what their generator writes, and they are laid out so that one can read them."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from research.templates.__main__ import FOLDER, text_of
from research.templates.catalogue import TEMPLATES
from research.templates.workflow import Workflow

MADE = [template() for template in TEMPLATES]
TITLE_PX, AIR_PX = 30, 80
SHOW_IMAGES = {"LoadImage", "PreviewImage", "SaveImage"}


@pytest.fixture(params=MADE, ids=lambda made: made.name)
def made(request: pytest.FixtureRequest) -> Workflow:
    return request.param


def written(made: Workflow) -> Path:
    return FOLDER / f"{made.name}.json"


def test_the_shipped_files_are_those_that_the_generator_writes():
    assert {path.stem for path in FOLDER.glob("*.json")} == {made.name for made in MADE}
    assert {path.stem for path in FOLDER.glob("*.jpg")} == {made.name for made in MADE}


def test_a_file_is_what_the_generator_writes(made: Workflow):
    assert written(made).read_text(encoding="utf-8") == text_of(made)


def test_a_search_for_the_pack_finds_it(made: Workflow):
    assert made.name.startswith("DreamCache ")


def test_nothing_overlaps_and_what_grows_has_air_below_it(made: Workflow):
    for one, other in permutations(made.to_json()["nodes"], 2):
        (left, top), (width, height) = one["pos"], one["size"]
        left_2, top_2 = other["pos"]
        grows = one["type"].startswith("DreamCache") or one["type"] in SHOW_IMAGES
        beside = left + width < left_2 or left_2 + other["size"][0] < left
        air = AIR_PX if grows else 0
        assert beside or top_2 < top or top + height + air <= top_2 - TITLE_PX, (one, other)


def test_wires_go_to_the_right_and_pass_no_node(made: Workflow):
    workflow = made.to_json()
    nodes = {node["id"]: node for node in workflow["nodes"]}
    lefts = sorted({node["pos"][0] for node in nodes.values()})
    routed = {end["id"] for end in workflow["extra"].get("linkExtensions", [])}
    for link, source, _, target, _, _ in workflow["links"]:
        columns = [lefts.index(nodes[node]["pos"][0]) for node in (source, target)]
        assert columns[1] > columns[0], link
        assert columns[1] == columns[0] + 1 or link in routed, link
    for x, y in (point["pos"] for point in workflow["extra"].get("reroutes", [])):
        for node in nodes.values():
            (left, top), (width, height) = node["pos"], node["size"]
            assert not (left <= x <= left + width and top - TITLE_PX <= y <= top + height), node


def test_a_model_file_comes_with_its_address(made: Workflow):
    for node in made.to_json()["nodes"]:
        if any(str(value).endswith(".safetensors") for value in node["widgets_values"]):
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0]
            assert model["url"].endswith(f"/{model['name']}")


def test_every_drawn_subject_is_another_one():
    """ComfyUI shows no preview on a node whose result another workflow left in its cache."""
    subjects = [
        tuple(node["widgets_values"])
        for made in MADE
        for node in made.to_json()["nodes"]
        if node["type"] in ("DreamCacheDemoReference", "DreamCacheDemoPhotos")
    ]
    assert len(set(subjects)) == len(subjects)


def test_an_input_that_a_node_lacks_is_refused():
    flow = Workflow("refused")
    flow.column()
    with pytest.raises(ValueError, match="nonsense"):
        flow.add("KSampler", nonsense=1)


def values(workflow: dict[str, Any], kind: str) -> list[Any]:
    return [node["widgets_values"] for node in workflow["nodes"] if node["type"] == kind]


def test_the_app_shows_inputs_that_are_there():
    (quickstart,) = (made for made in MADE if "Quickstart" in made.name)
    workflow = json.loads(written(quickstart).read_text(encoding="utf-8"))
    assert values(workflow, "KSampler")
    nodes = {node["id"]: node["type"] for node in workflow["nodes"]}
    data = workflow["extra"]["linearData"]
    assert [(nodes[node], name) for node, name in data["inputs"]] == [
        ("DreamCacheDemoReference", "shape"),
        ("DreamCacheDemoReference", "seed"),
        ("CLIPTextEncode", "text"),
        ("DreamCacheFromPhoto", "strength"),
    ]
    assert [nodes[node] for node in data["outputs"]] == ["PreviewImage"]
