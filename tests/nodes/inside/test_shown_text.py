"""What nodes show on ComfyUI's page: text, whatever the names in a stranger's file or workflow are."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import CORE, encode, execute, make_adapters, make_model

import nodes as comfy_nodes

SCRIPT = "<img src=x onerror=alert(1)>"


@pytest.fixture
def shown(monkeypatch):
    """Stand for the server: keep what it would send to the page."""
    texts = []
    instance = SimpleNamespace(send_progress_text=lambda text, _: texts.append(text))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", server)
    for name, node in comfy_nodes.NODE_CLASS_MAPPINGS.items():
        if name.startswith("DreamCache"):
            monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7"))
    return texts


def test_a_file_name_of_a_shared_workflow_is_shown_as_text(shown):
    with torch.inference_mode():
        reference = encode(make_model("sd15"))
    execute("DreamCacheSaveReference", reference=reference, filename_prefix=f"dreamcache/{SCRIPT}")
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown[-1]
    assert "<" not in shown[-1]


def test_what_an_adapter_file_says_of_itself_is_shown_as_text(shown):
    report = sys.modules[f"{CORE.__name__.rpartition('.')[0]}.nodes.host.report"]
    adapters = make_adapters(make_model("sd15"))
    extra = {"fitted": "1", report.FITTED: "1"}
    adapters.info = dataclasses.replace(
        adapters.info, base_model=f'{SCRIPT}"\n\x1b[2J', extra=extra
    )
    text = report.report(
        comfy_nodes.NODE_CLASS_MAPPINGS["DreamCacheLoadAdapters"],
        report.describe_adapters(adapters),
    ).as_dict()["text"][0]
    assert SCRIPT in text
    assert text.isprintable()
    assert "&lt;img" in shown[0]
    assert "<" not in shown[0]
