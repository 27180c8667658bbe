"""The shipped workflows in ComfyUI's own page, in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from comfy_server import PACK, PACK_FOLDER
from playwright.sync_api import Page, sync_playwright
from workflow_to_api import PAGE_ONLY, workflow_to_api

from dreamcache_core.demo.measures.match import measure_match
from dreamcache_core.demo.world.world import draw_subject

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WORKFLOWS = {path.stem: path for path in sorted((PACK / "example_workflows").glob("*.json"))}
WITH, WITHOUT = "With the reference", "Without"
STEP_BY_STEP = "DreamCache 2 - Your photo, step by step (SD 2.1)"
DEMOS = [name for name in WORKFLOWS if "(no download)" in name]
CLEARLY = 0.1
"""By how much an image must match the subject better with the reference than without, of 1."""
TITLE_PX = 30
READY_MS, DONE_MS = 90_000, 60_000

READY = "() => window.app?.vueAppReady && window.app.graph"
LOAD = "async workflow => { await window.app.loadGraphData(workflow); }"
SAVED = "() => window.app.graph.serialize()"
DRAW_BY = (
    "async vue => { await window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue); }"
)
TOGGLE_APP = "() => window.app.extensionManager.command.execute('Comfy.ToggleLinear')"
SHOW_ALL = """() => {
    const canvas = window.app.canvas, nodes = window.app.graph._nodes;
    const ends = axis => [
        Math.min(...nodes.map(node => node.pos[axis])), Math.max(...nodes.map(node => node.pos[axis] + node.size[axis])),
    ];
    const [left, right] = ends(0), [top, bottom] = ends(1);
    const scale = Math.min(1900 / (right - left), 800 / (bottom - top));
    canvas.ds.scale = scale;
    canvas.ds.offset = [90 / scale - left, 120 / scale - top];
    canvas.setDirty(true, true);
}"""
LOOK_AWAY = (
    "() => { window.app.canvas.ds.offset = [5000, 0]; window.app.canvas.setDirty(true, true); }"
)
NODES = """() => window.app.graph._nodes.map(node => ({
    type: node.type, broken: Boolean(node.has_errors), size: [...node.size], pos: [...node.pos],
    known: Boolean(window.LiteGraph.registered_node_types[node.type]),
    drawn: window.app.canvas.visible_nodes.includes(node),
}))"""
DRAWN_BOXES = """() => [...document.querySelectorAll('[data-node-id]')].map(node => {
    const box = node.getBoundingClientRect();
    return [node.innerText.split('\\n')[0], box.left, box.top, box.right, box.bottom];
})"""
SET_WIDGETS = """changes => window.app.graph._nodes.forEach(node => {
    for (const [name, value] of Object.entries(changes[node.type] ?? {}))
        node.widgets.find(widget => widget.name === name).value = value;
})"""
EARLY = ("0.3.", "0.8.")
"""Versions of ComfyUI with pages from before Nodes 2.0."""

IMAGES_SHOWN = """ids => ids.every(id => {
    const node = window.app.graph.getNodeById(id);
    const images = node.imgs ?? [...document.querySelectorAll(`[data-node-id="${id}"] img`)];
    return images.length && [...images].every(image => image.complete && image.naturalWidth);
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium found: install the package chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page(browser, server) -> Iterator[Page]:
    """ComfyUI's page after its first start, with nothing but the server in reach."""
    server.post_json("/settings", {"Comfy.TutorialCompleted": True})
    opened = browser.new_page(viewport={"width": 2080, "height": 1000})
    # a pattern, not a function: the page's own requests do not wait for this process, which waits for the server
    outside = re.compile(rf"^(?!{re.escape(server.url)}|data:|blob:)")
    opened.route(outside, lambda route: route.abort())
    opened.problems = []
    opened.on("pageerror", lambda error: opened.problems.append(error.stack or str(error)))
    opened.on("console", lambda message: _note(opened.problems, message))
    opened.goto(server.url)
    opened.wait_for_function(READY, timeout=READY_MS)
    # the page of 2025 stumbles over itself at its start: what does not name the pack is its own
    opened.problems[:] = [problem for problem in opened.problems if PACK_FOLDER in problem]
    yield opened
    opened.close()


def _note(problems: list[str], message: Any) -> None:
    where = message.location.get("url", "")
    if message.type == "error" and (PACK_FOLDER in where or "dreamcache" in message.text.lower()):
        problems.append(f"{where}: {message.text}")


@pytest.fixture(scope="module", params=["classic", "nodes 2.0"])
def rendering(request, page, server) -> Iterator[str]:
    if request.param == "nodes 2.0" and server.version.startswith(EARLY):
        pytest.skip("this ComfyUI has no such rendering, or an early one")
    page.evaluate(DRAW_BY, request.param == "nodes 2.0")
    yield request.param
    page.evaluate(DRAW_BY, False)


@pytest.fixture(scope="module", params=list(WORKFLOWS))
def name(request, server) -> str:
    server.skip_if_too_old_for(request.param)
    return request.param


@pytest.fixture(scope="module")
def opened_workflow(page, adapters, rendering, name) -> dict[str, Any]:
    return open_workflow(page, name)


def open_workflow(page: Page, name: str) -> dict[str, Any]:
    workflow = json.loads(WORKFLOWS[name].read_text(encoding="utf-8"))
    page.evaluate(LOAD, workflow)
    page.wait_for_function(f"() => window.app.graph._nodes.length === {len(workflow['nodes'])}")
    page.evaluate(SHOW_ALL)
    page.wait_for_timeout(500)
    return workflow


def test_the_page_knows_and_draws_every_node(page, opened_workflow):
    nodes = page.evaluate(NODES)
    assert {node["type"] for node in nodes} == {node["type"] for node in opened_workflow["nodes"]}
    assert [node["type"] for node in nodes if not node["known"] or node["broken"]] == []
    assert [node["type"] for node in nodes if not node["drawn"]] == []
    assert page.locator(".p-dialog").count() == 0
    assert page.problems == []


def test_nodes_do_not_overlap(page, rendering, opened_workflow):
    assert_apart(page, rendering)


def assert_apart(page: Page, rendering: str) -> None:
    """No node covers another one or its title."""
    if rendering == "classic":
        boxes = [
            (node["type"], left, top - TITLE_PX, left + node["size"][0], top + node["size"][1])
            for node in page.evaluate(NODES)
            for left, top in [node["pos"]]
        ]
    else:
        boxes = page.evaluate(DRAWN_BOXES)
        assert len(boxes) == len(page.evaluate(NODES))
    for (one, left, top, right, bottom), (other, left_2, top_2, right_2, bottom_2) in combinations(
        boxes, 2
    ):
        apart = right <= left_2 or right_2 <= left or bottom <= top_2 or bottom_2 <= top
        assert apart, f"{one} and {other}"


def test_the_page_reads_the_file_as_our_converter_does(page, opened_workflow, object_info):
    """The same nodes, links and values: the file's widget values are in the right order."""
    theirs = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    ours = workflow_to_api(opened_workflow, object_info)
    assert {node["class_type"] for node in ours.values()}.isdisjoint(PAGE_ONLY)
    assert {key: node["class_type"] for key, node in theirs.items()} == {
        key: node["class_type"] for key, node in ours.items()
    }
    for key, node in ours.items():
        assert {name: theirs[key]["inputs"][name] for name in node["inputs"]} == node["inputs"]


def test_a_workflow_that_is_saved_and_opened_again_is_the_same(page, opened_workflow):
    saved = page.evaluate(SAVED)
    page.evaluate(LOAD, saved)
    page.wait_for_timeout(500)
    again = page.evaluate(SAVED)
    for part in ("nodes", "links", "groups"):
        assert again[part] == saved[part], part
    for part in ("reroutes", "linkExtensions", "linearData"):
        assert without_none(saved["extra"].get(part)) == opened_workflow["extra"].get(part), part
        assert again["extra"].get(part) == saved["extra"].get(part), part


def without_none(tree: Any) -> Any:
    """The page writes out what a file may leave out."""
    if isinstance(tree, dict):
        return {key: without_none(value) for key, value in tree.items() if value is not None}
    return [without_none(value) for value in tree] if isinstance(tree, list) else tree


def test_queueing_in_the_page_shows_the_images(
    page, opened_workflow, rendering, name, adapters, server
):
    if name not in (*DEMOS, STEP_BY_STEP):
        pytest.skip("needs a model that is not here")
    small = {
        "DreamCacheLoadAdapters": {"adapters": adapters},
        "DreamCacheReferenceImage": {"size": 128},
        "LoadImage": {"image": "cut_out.png"},
    }
    if name == STEP_BY_STEP:
        small["EmptyLatentImage"] = {"width": 128, "height": 128}
        small["KSampler"] = {"steps": 4}
    page.evaluate(SET_WIDGETS, small)
    with page.expect_response("**/prompt") as answer:
        page.get_by_test_id("queue-button").click()
    run = server.wait(answer.value.json()["prompt_id"])
    shown = {int(key): of["images"] for key, of in run["outputs"].items() if "images" in of}
    page.wait_for_function(IMAGES_SHOWN, arg=[*shown], timeout=DONE_MS)
    page.wait_for_timeout(500)
    assert page.problems == []
    assert_apart(page, rendering)
    images = {key: [server.shown_image(image) for image in of] for key, of in shown.items()}
    for image in (image for of in images.values() for image in of):
        assert image.shape[0] == 128
        assert image.std() > 5
    if WITHOUT in {node.get("title") for node in opened_workflow["nodes"]}:
        assert (
            match(opened_workflow, images, WITH) > match(opened_workflow, images, WITHOUT) + CLEARLY
        )


def match(workflow: dict[str, Any], images: dict[int, list[np.ndarray]], title: str) -> float:
    """How well the images of a preview show the subjects of a demo workflow, 0 to 1."""
    (preview,) = (
        node["id"]
        for node in workflow["nodes"]
        if node.get("title") == title and node["id"] in images
    )
    subjects = [
        draw_subject(np.random.default_rng(seed), shape)
        for node in workflow["nodes"]
        if node["type"] == "DreamCacheDemoReference"
        for shape, seed, _ in [node["widgets_values"]]
    ]
    return float(
        np.mean(
            [
                measure_match(image, subject).match
                for image in images[preview]
                for subject in subjects
            ]
        )
    )


SHOWN = """([type, ids]) => {
    const node = window.LiteGraph.createNode(type), named = (list, id) => list?.find(one => one.name === id);
    return ids.map(id => {
        const widget = named(node.widgets, id), slot = named(node.inputs, id);
        return [widget?.label ?? slot.label ?? slot.localized_name, Boolean(widget?.options?.advanced)];
    });
}"""
OF_APPLY = ["DreamCacheApply", ["scale", "mask", "start_percent"]]


def test_the_quickstart_is_an_app_too(page, server):
    if server.version.startswith(EARLY):
        pytest.skip("this ComfyUI has no apps")
    open_workflow(page, "DreamCache 1 - Quickstart (no download)")
    page.evaluate(TOGGLE_APP)
    try:
        for label in ("shape", "seed", "text", "strength"):
            shown = page.get_by_text(label, exact=True).filter(visible=True)
            shown.first.wait_for(timeout=15_000)
        assert page.get_by_text("cfg", exact=True).filter(visible=True).count() == 0
    finally:
        page.evaluate(TOGGLE_APP)


def test_a_node_shows_its_names_and_hides_what_is_advanced(page):
    assert page.evaluate(SHOWN, OF_APPLY) == [
        ["strength", False],
        ["region", False],
        ["start_percent", True],
    ]


def test_a_node_shows_its_names_in_another_language(page, server):
    translated = json.loads((PACK / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    inputs = translated["DreamCacheApply"]["inputs"]
    server.post_json("/settings", {"Comfy.Locale": "zh"})
    try:
        page.reload()
        page.wait_for_function(READY, timeout=READY_MS)
        shown = page.evaluate(SHOWN, OF_APPLY)
    finally:
        server.post_json("/settings", {"Comfy.Locale": "en"})
        page.reload()
        page.wait_for_function(READY, timeout=READY_MS)
    assert [name for name, _ in shown] == [inputs[name]["name"] for name in OF_APPLY[1]]


def test_a_search_for_an_artists_word_finds_the_node(page, object_info):
    if "search_aliases" not in object_info["DreamCacheApply"]:
        pytest.skip("this ComfyUI searches names only")
    open_workflow(page, DEMOS[0])
    search_for(page, "dreambooth")
    page.get_by_role("option", name="Apply DreamCache").first.wait_for()
    page.keyboard.press("Escape")


def search_for(page: Page, words: str) -> None:
    """Open the node search in an empty place, and type."""
    page.evaluate(LOOK_AWAY)
    page.wait_for_function("() => window.app.canvas.visible_nodes.length === 0")
    page.mouse.dblclick(900, 300)
    page.locator("input:focus").press_sequentially(words)
