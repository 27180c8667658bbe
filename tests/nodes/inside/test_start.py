"""What the pack does when ComfyUI loads it, and what it says of files that are not there."""

import logging
import os
from dataclasses import fields
from pathlib import Path

import folder_paths
import pytest
from comfy_api.latest import io
from tiny import CORE, pack_module, run

import nodes as comfy_nodes

FOLDERS, VERSION = pack_module("nodes.host.folders"), pack_module("nodes.version")


def test_a_models_folder_that_cannot_be_written_costs_no_node(monkeypatch, caplog):
    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr(os, "makedirs", refuse)
    with caplog.at_level(logging.WARNING):
        FOLDERS.register_folders()
    assert "Read-only file system" in caplog.text
    assert str(Path("models", "dreamcache")) in caplog.text
    assert folder_paths.get_folder_paths("dreamcache")


@pytest.mark.parametrize("version", ["0.3.51", "0.3.63", "v0.2.7", "0.3"])
def test_a_comfyui_that_is_too_old_is_refused_in_words(version):
    with pytest.raises(ImportError, match=rf"needs ComfyUI 0\.3\.64 or newer; this is {version}"):
        VERSION.require_comfyui(version)


@pytest.mark.parametrize("version", ["0.3.64", "0.3.65-dev", "v0.8.0", "0.10.1", "1.0", "nightly"])
def test_others_are_taken(version):
    VERSION.require_comfyui(version)


SCHEMAS = {
    name: node.GET_SCHEMA()
    for name, node in comfy_nodes.NODE_CLASS_MAPPINGS.items()
    if name.startswith("DreamCache")
}


@pytest.mark.parametrize(
    "word",
    [
        *("personalize", "personalise", "subject", "character", "identity"),
        *("dreambooth", "ip adapter", "reference"),
    ],
)
def test_a_search_by_an_artists_word_finds_the_nodes_of_the_simple_path(word):
    if "search_aliases" not in {field.name for field in fields(io.Schema)}:
        pytest.skip("this ComfyUI searches names only")
    for name in ("DreamCacheLoadAdapters", "DreamCacheEncode", "DreamCacheApply"):
        assert word in SCHEMAS[name].search_aliases
    assert all(schema.search_aliases for schema in SCHEMAS.values())


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_node_says_whose_it_is_and_lies_in_one_of_few_folders(name):
    assert "DreamCache" in SCHEMAS[name].display_name
    first, *below = SCHEMAS[name].category.split("/")
    assert first == "DreamCache"
    assert below in ([], ["advanced"], ["training"], ["demo"])


CHOICES = [
    ("DreamCacheLoadAdapters", "adapters"),
    ("DreamCacheLoadReference", "reference"),
    ("DreamCacheEncodeFolder", "folder"),
]


@pytest.mark.parametrize(
    ("node", "name", "choice", "where"),
    [
        ("DreamCacheLoadAdapters", "adapters", "theirs.safetensors", "models/dreamcache"),
        ("DreamCacheLoadReference", "reference", "dog.safetensors [output]", "output"),
        ("DreamCacheEncodeFolder", "folder", "cats", "input"),
    ],
)
def test_a_file_that_is_not_there_is_refused_before_the_run_with_the_folders(
    node, name, choice, where
):
    check = comfy_nodes.NODE_CLASS_MAPPINGS[node].validate_inputs
    said = check(**{name: choice})
    assert choice in said
    assert where in said.replace("\\", "/")
    assert check(**{name: None}) is True  # comes over a link: known only in the run


@pytest.mark.parametrize(("node", "name"), CHOICES)
def test_a_choice_that_comes_over_a_link_is_no_reason_to_run_again(node, name):
    fingerprint = comfy_nodes.NODE_CLASS_MAPPINGS[node].fingerprint_inputs
    assert fingerprint(**{name: None}) == fingerprint(**{name: None})


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Folders below ``tmp_path``, for input and output, that were looked into."""
    looked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(str(path)) or scandir(path))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    return looked


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_only_folders_that_changed_are_listed_again(tmp_path, listed):
    write(tmp_path / "cats" / "deep" / "cat.png")
    assert FOLDERS.list_image_folders() == FOLDERS.list_image_folders() == ["cats/deep"]
    assert listed == [str(tmp_path), str(tmp_path / "cats"), str(tmp_path / "cats" / "deep")]
    listed.clear()
    write(tmp_path / "cats" / "cat.png")
    assert FOLDERS.list_image_folders() == ["cats", "cats/deep"]
    assert listed == [str(tmp_path / "cats")]
    (tmp_path / "cats" / "deep" / "cat.png").unlink()
    (tmp_path / "cats" / "deep").rmdir()
    assert FOLDERS.list_image_folders() == ["cats"]


def test_references_are_not_looked_for_among_all_outputs(tmp_path, listed):
    for parts in (("dog",), ("dreamcache", "dog"), ("dreamcache", "my", "dog"), ("images", "dog")):
        write(tmp_path.joinpath(*parts[:-1], "dog.safetensors"))
    mine = [name for name in FOLDERS.list_reference_files() if "[output]" in name]
    names = ("dog", os.path.join("dreamcache", "dog"), os.path.join("dreamcache", "my", "dog"))
    assert mine == [f"{name}.safetensors [output]" for name in names]
    assert str(tmp_path / "images") not in listed
    elsewhere = "images/dog.safetensors [output]"  # as workflows of before may say
    assert Path(FOLDERS.reference_path(elsewhere)) == tmp_path / "images" / "dog.safetensors"


def test_a_name_with_backslashes_is_found_on_every_system():
    path = Path(folder_paths.get_output_directory(), "mine", "dog.safetensors")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    try:
        assert FOLDERS.reference_path("mine\\dog.safetensors [output]") == str(path)
    finally:
        path.unlink()
        path.parent.rmdir()


def test_a_name_on_another_drive_is_refused_in_words(monkeypatch):
    def on_two_drives(paths):
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", on_two_drives)
    with pytest.raises(CORE.InputError, match="no saved reference"):
        run("DreamCacheLoadReference", reference="D:/dog.safetensors [output]")
    with pytest.raises(CORE.InputError, match="no folder"):
        FOLDERS.image_paths("D:/cats")
