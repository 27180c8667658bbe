"""The shipped workflow on a real ComfyUI server, over HTTP, with a real photograph.

The models are tiny and random (``tiny_models_pack``), so the images are not pretty; everything else is as a user has it.
After a wanted change of the nodes: ``UPDATE_SNAPSHOT=1 pytest tests/e2e -k snapshot`` writes ``node_snapshot.json`` anew.
"""

import json
import os
import re
import struct
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from comfy_server import ADAPTERS, PACK, PACK_FOLDER, write_adapters
from workflow_to_api import missing_classes, workflow_to_api

WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
QUICKSTART, STEP_BY_STEP = (
    PACK / "example_workflows" / f"DreamCache {name}.json"
    for name in ("1 - Quickstart (no download)", "2 - Your photo, step by step (SD 2.1)")
)
SNAPSHOT = Path(__file__).with_name("node_snapshot.json")
OURS = "DreamCache"


@pytest.fixture(scope="session")
def first_run(server, object_info, adapters) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shipped workflow, made small, and its first run."""
    prompt = small_prompt(object_info, adapters)
    return prompt, server.run(prompt)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def small_prompt(object_info: dict[str, Any], adapters: str, **changes: dict[str, Any]):
    """The one-reference workflow at 128 x 128 and four steps; ``changes`` are inputs by class."""
    prompt = workflow_to_api(load(STEP_BY_STEP), object_info)
    small = {
        "DreamCacheLoadAdapters": {"adapters": adapters},
        "DreamCacheReferenceImage": {"size": 128},
        "EmptyLatentImage": {"width": 128, "height": 128},
        "KSampler": {"steps": 4, "seed": 7},
    }
    for node in prompt.values():
        node["inputs"].update(small.get(node["class_type"], {}))
        node["inputs"].update(changes.get(node["class_type"], {}))
    return prompt


def node_id(prompt: dict[str, Any], class_type: str) -> str:
    return next(key for key, node in prompt.items() if node["class_type"] == class_type)


def image(server, prompt: dict[str, Any], entry: dict[str, Any]) -> np.ndarray:
    return server.saved_image(entry, node_id(prompt, "SaveImage"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_node_of_a_shipped_workflow_is_missing(server, object_info, path):
    server.skip_if_too_old_for(path.stem)
    workflow = load(path)
    assert missing_classes(workflow, object_info) == set()
    prompt = workflow_to_api(workflow, object_info)
    for node in prompt.values():
        inputs = object_info[node["class_type"]]["input"]
        assert set(inputs["required"]) - {"adapters"} <= set(node["inputs"]), node["class_type"]
        assert set(node["inputs"]) <= {**inputs["required"], **inputs.get("optional", {})}.keys()


def test_the_photograph_goes_through_the_shipped_workflow(server, first_run):
    prompt, entry = first_run
    pixels = image(server, prompt, entry)
    assert pixels.shape == (128, 128, 3)
    assert pixels.std() > 5
    previews = entry["outputs"][node_id(prompt, "DreamCacheReferenceImage")]["images"]
    assert len(previews) == 1
    report = entry["outputs"][node_id(prompt, "DreamCacheEncode")]["text"][0]
    assert "1 image, 128 x 128" in report
    assert " MB" in report


def test_a_second_queue_with_another_seed_does_not_encode_again(server, first_run):
    prompt, entry = first_run
    first = image(server, prompt, entry)
    sampler = prompt[node_id(prompt, "KSampler")]["inputs"]
    again = {**prompt, node_id(prompt, "KSampler"): {"class_type": "KSampler"}}

    def run_with_seed(seed: int) -> tuple[np.ndarray, list[str]]:
        again[node_id(prompt, "KSampler")]["inputs"] = {**sampler, "seed": seed}
        run = server.run(again)
        return image(server, again, run), run["messages"]["execution_cached"]["nodes"]

    other, cached = run_with_seed(8)
    assert node_id(prompt, "DreamCacheEncode") in cached
    assert node_id(prompt, "KSampler") not in cached
    assert not np.array_equal(first, other)
    same, cached = run_with_seed(7)
    assert node_id(prompt, "DreamCacheEncode") in cached
    assert node_id(prompt, "KSampler") not in cached
    np.testing.assert_array_equal(first, same)


def test_scale_zero_is_the_plain_model_and_scale_one_is_not(server, object_info, first_run):
    prompt, entry = first_run
    with_reference = image(server, prompt, entry)
    off = small_prompt(object_info, ADAPTERS, DreamCacheApply={"scale": 0.0})
    scale_zero = image(server, off, server.run(off))
    apply, loader = node_id(prompt, "DreamCacheApply"), node_id(prompt, "CheckpointLoaderSimple")
    plain = {key: node for key, node in prompt.items() if not node["class_type"].startswith(OURS)}
    assert plain[node_id(prompt, "KSampler")]["inputs"]["model"] == [apply, 0]
    sampler = {**plain[node_id(prompt, "KSampler")]["inputs"], "model": [loader, 0]}
    plain[node_id(prompt, "KSampler")] = {"class_type": "KSampler", "inputs": sampler}
    np.testing.assert_array_equal(scale_zero, image(server, plain, server.run(plain)))
    assert np.abs(with_reference.astype(int) - scale_zero).mean() > 1


def test_the_quickstart_needs_no_model_file_and_its_reference_tells(server, object_info):
    prompt = workflow_to_api(load(QUICKSTART), object_info)
    loaders = [node["class_type"] for node in prompt.values() if "Load" in node["class_type"]]
    assert loaders == []
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"].update(steps=4, seed=7)
    outputs = server.run(prompt)["outputs"]
    with_reference, without = (
        [server.shown_image(shown) for shown in outputs[key]["images"]]
        for key, node in prompt.items()
        if node["class_type"] == "PreviewImage"
    )
    assert len(with_reference) == len(without) == 4
    for one, other in zip(with_reference, without, strict=True):
        assert one.shape == (128, 128, 3)
        assert np.abs(one.astype(int) - other).mean() > 1


def test_a_shipped_workflow_without_its_adapters_says_where_they_belong(server, object_info):
    prompt = workflow_to_api(load(STEP_BY_STEP), object_info)
    refusal = server.refusal(prompt)
    (error,) = refusal["node_errors"][node_id(prompt, "DreamCacheLoadAdapters")]["errors"]
    assert str(server.base / "models" / "dreamcache") in error["details"]
    assert "cross_attention-<step>.pt" in error["details"]


def test_a_transparent_background_is_cut_away(server, object_info, adapters, first_run):
    opaque_prompt, entry = first_run
    cut = small_prompt(object_info, adapters, LoadImage={"image": "cut_out.png"})
    run = server.run(cut)
    assert not np.array_equal(image(server, cut, run), image(server, opaque_prompt, entry))
    shown = run["outputs"][node_id(cut, "DreamCacheReferenceImage")]["images"][0]
    preview = server.shown_image(shown)
    assert (preview[:4] == 255).all()
    assert (preview[:, :4] == 255).all()
    assert preview[48:80, 48:80].std() > 5
    corner_of_the_subject = preview[14:22, 14:22]  # outside the ellipse, inside its bounding box
    assert (corner_of_the_subject > 250).all()


def test_the_adapter_list_shows_files_as_they_arrive(server, adapters):
    # the fixture saw the placeholder before the file was there
    assert adapters in server.adapter_choices()
    late = server.base / "models" / "dreamcache" / "late.pt"
    write_adapters(late, seed=1)
    try:
        assert "late.pt" in server.adapter_choices()
    finally:
        late.unlink()
    assert "late.pt" not in server.adapter_choices()


BAD_FILES = {
    "a web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "LFS",
    ),
    "a truncated file": (struct.pack("<Q", 4096) + b"{", "download"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_adapter_files_come_back_as_a_readable_node_error(server, object_info, adapters, what):
    content, word = BAD_FILES[what]
    path = server.base / "models" / "dreamcache" / "bad.safetensors"
    path.write_bytes(content)
    try:
        prompt = small_prompt(object_info, path.name)
        entry = server.wait(server.queue(prompt))
    finally:
        path.unlink()
    assert entry["status"]["status_str"] == "error"
    error = entry["messages"]["execution_error"]
    assert error["node_id"] == node_id(prompt, "DreamCacheLoadAdapters")
    assert word.lower() in error["exception_message"].lower()
    assert "bad.safetensors" in error["exception_message"]


def test_the_template_browser_lists_the_workflow_and_serves_its_image(server):
    listed = server.get_json("/workflow_templates")[PACK_FOLDER]
    assert sorted(listed) == [path.stem for path in WORKFLOWS]
    for name in listed:
        served = f"/api/workflow_templates/{PACK_FOLDER}/{quote(name)}"
        assert json.loads(server.get(f"{served}.json")) == load(
            PACK / "example_workflows" / f"{name}.json"
        )
        assert server.get(f"{served}.jpg").startswith(b"\xff\xd8")


def test_every_node_has_a_help_page_on_the_server(server, object_info):
    for name in filter(lambda name: name.startswith(OURS), object_info):
        page = server.get(f"/extensions/{PACK_FOLDER}/docs/{name}.md").decode()
        assert page.startswith("# "), name
        for image in re.findall(r"\((images/.+?)\)", page):
            assert server.get(f"/extensions/{PACK_FOLDER}/docs/{image}").startswith(b"RIFF")


def test_the_server_hands_out_the_translations(server, object_info):
    translations = server.get_json("/i18n")
    for path in (PACK / "locales").glob("*/nodeDefs.json"):
        served = translations[path.parent.name]["nodeDefs"]
        ours = {name: texts for name, texts in served.items() if name.startswith(OURS)}
        assert ours == load(path)
        assert set(ours) <= object_info.keys()


def test_nodes_are_those_of_the_snapshot(server, object_info):
    """Ids, inputs, types, defaults and outputs are a contract: saved workflows rely on them.

    The core's nodes are recorded of one version, for ``research/templates``; name one there to have it recorded.
    """
    recorded = load(SNAPSHOT)
    stock = recorded["stock_nodes"]
    if server.version == recorded["stock_version"]:
        stock = {name: contract(object_info[name]) for name in stock}
    now = {
        "nodes": {n: contract(object_info[n]) for n in sorted(object_info) if n.startswith(OURS)},
        "stock_version": recorded["stock_version"],
        "stock_nodes": stock,
    }
    (choice,) = (
        i for i in now["nodes"]["DreamCacheFromPhoto"]["inputs"] if i["name"] == "adapters"
    )
    choice["default"] = "from this model"  # where there is one file, that
    choice["options"] = choice["options"][:1]  # files follow
    if os.environ.get("UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    assert now == load(SNAPSHOT)


KEPT = (
    *("default", "min", "max", "advanced", "multiline"),
    *("control_after_generate", "image_upload", "forceInput"),
)


def contract(info: dict[str, Any]) -> dict[str, Any]:
    """What saved workflows and API users rely on; lists of files are left out.

    Inputs are listed in their order: workflows save the values of widgets by position.
    """
    inputs = []
    for group in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(group, {}).items():
            options = rest[0] if rest else {}
            kept = {key: options[key] for key in KEPT if key in options}
            if "default" in options and "options" in options:
                kept["options"] = options["options"]
            kind = "COMBO" if isinstance(kind, list) else kind
            inputs.append({"name": name, "type": kind, "group": group, **kept})
    outputs = [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs, "output_node": info["output_node"]}
