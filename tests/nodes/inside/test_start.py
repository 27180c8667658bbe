"""What the pack does when ComfyUI loads it, and what it says of files that are not there."""

import html
import logging
import os
import shutil
import time
from dataclasses import fields
from pathlib import Path

import folder_paths
import pytest
from comfy_api.latest import io
from comfy_execution.utils import CurrentNodeContext
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


WORDS = (
    "personalize",
    "personalise",
    "subject",
    "character",
    "identity",
    "dreambooth",
    "ip adapter",
    "reference",
)
if "search_aliases" in {field.name for field in fields(io.Schema)}:  # others search names only

    @pytest.mark.parametrize("word", WORDS)
    def test_a_search_by_an_artists_word_finds_the_nodes_of_the_simple_path(word):
        for name in (
            "DreamCacheFromPhoto",
            "DreamCacheLoadAdapters",
            "DreamCacheApply",
        ):
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


@pytest.fixture
def linked(tmp_path):
    """Folders whose links lead in circles: listed along them, there are more names than could be counted."""
    for name in "abcdefgh":
        write(tmp_path / "dreamcache" / name / "deep" / f"{name}.png")
        write(tmp_path / "dreamcache" / name / f"{name}.safetensors")
    for name in "abcdefgh":
        for other in "abcdefgh":
            link = tmp_path / "dreamcache" / name / f"to_{other}"
            try:
                link.symlink_to(tmp_path / "dreamcache" / other, target_is_directory=True)
            except OSError:
                pytest.skip("this system makes no links for everybody")
    (tmp_path / "dreamcache" / "up").symlink_to(tmp_path, target_is_directory=True)
    return tmp_path


def test_folders_with_links_in_circles_are_listed_once_and_at_once(linked, listed):
    start = time.process_time()
    assert FOLDERS.list_image_folders() == [f"dreamcache/{name}/deep" for name in "abcdefgh"]
    mine = [name for name in FOLDERS.list_reference_files() if "[output]" in name]
    assert mine == [
        f"{os.path.join('dreamcache', name, name)}.safetensors [output]" for name in "abcdefgh"
    ]
    assert time.process_time() - start < 2
    assert len(listed) == len(set(listed))


def test_adapters_in_folders_with_links_in_circles_are_listed_once(linked, monkeypatch):
    folders = folder_paths.folder_names_and_paths
    monkeypatch.setitem(folders, "dreamcache", ([str(linked)], {".safetensors"}))
    assert FOLDERS.list_adapter_files() == [
        f"{os.path.join('dreamcache', name, name)}.safetensors" for name in "abcdefgh"
    ]


def test_a_folder_that_is_reached_by_a_link_alone_is_listed(tmp_path, listed):
    write(tmp_path / "elsewhere" / "cats" / "cat.png")
    (tmp_path / "in").mkdir()
    try:
        (tmp_path / "in" / "a").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links for everybody")
    folder_paths.input_directory = str(tmp_path / "in")
    assert FOLDERS.list_image_folders() == ["a/cats"]


def test_images_of_every_kind_are_found_and_what_is_left_out_is_said(tmp_path, listed):
    names = ["a.png", "b.JPG", "c.webp", "e.tif", "f.gif", "h.jp2", "i.avif"]
    for name in (*names, "g.heic", "notes.txt", "._a.png", ".DS_Store"):
        write(tmp_path / "mixed" / name)
    write(tmp_path / "mixed" / ".ipynb_checkpoints" / "a-checkpoint.png")
    write(tmp_path / "only_hidden" / "._a.png")
    assert FOLDERS.list_image_folders() == ["mixed"]
    known = [name for name in names if name.lower().endswith(FOLDERS.image_endings())]
    assert set(known) >= {"a.png", "b.JPG", "c.webp", "e.tif", "f.gif"}
    assert [os.path.basename(path) for path in FOLDERS.image_paths("mixed")] == known
    said = FOLDERS.left_out("mixed")
    assert "g.heic" in said
    assert "notes.txt" in said
    assert "._a" not in said


def test_two_that_save_at_the_same_time_get_two_files():
    with (
        FOLDERS.new_reference_path("claimed/dog") as one,
        FOLDERS.new_reference_path("claimed/dog") as other,
    ):
        assert one != other
        assert Path(one).exists()
        assert Path(other).exists()
    shutil.rmtree(Path(one).parent)


def test_a_failed_save_leaves_no_empty_file():
    def fail():
        with FOLDERS.new_reference_path("claimed/cat") as path:
            assert Path(path).exists()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    folder = Path(folder_paths.get_output_directory(), "claimed")
    assert list(folder.iterdir()) == []
    folder.rmdir()


@pytest.mark.parametrize(("node", "name"), CHOICES)
@pytest.mark.parametrize("value", [None, 5, ["a"], {}])
def test_null_and_other_values_over_the_api_are_refused_in_words(node, name, value):
    finds = {"adapters": "adapter_path", "reference": "reference_path", "folder": "image_paths"}
    with pytest.raises(CORE.InputError, match="There is no"):
        getattr(FOLDERS, finds[name])(value)


def test_numbers_of_a_link_are_refused_out_of_range_as_typed_ones_are():
    numbers = [
        (node, each)
        for node, schema in SCHEMAS.items()
        for each in schema.inputs
        if isinstance(each, io.Int.Input | io.Float.Input)
    ]
    assert len(numbers) > 30
    for node, each in numbers:
        execute = comfy_nodes.NODE_CLASS_MAPPINGS[node].execute
        for value in (each.min - 1, each.max + 1, float("nan"), [each.max + 1]):
            with pytest.raises(CORE.InputError, match=f"Expected {each.id} in {each.min} "):
                execute(**{each.id: value})


def test_an_error_is_shown_on_its_node_and_named_without_a_path(page):
    with CurrentNodeContext("prompt", "7"), pytest.raises(CORE.InputError) as caught:
        run("DreamCacheLoadReference", reference="zzz")
    # how ComfyUI names it in front of the message
    assert (caught.type.__module__, caught.type.__qualname__) == ("builtins", "InputError")
    assert page.texts == [("7", html.escape(str(caught.value)))]
