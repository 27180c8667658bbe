"""Folders as kohya, OneTrainer, Hugging Face and people lay them out are training sets as they lie."""

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import ImageOps
from test_sources import BOX, make_image, mask, write_pair

from dreamcache_core.data.checking import LEFT_OUT, UNREADABLE, check_source
from dreamcache_core.data.sources.opening import open_source
from dreamcache_core.data.sources.source import fingerprint, spread
from dreamcache_core.errors import InputError


def write(folder: Path, name: str, caption: str | None = None, ending: str = ".txt") -> Path:
    """Write an image and its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    make_image().save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(ending).write_text(caption, encoding="utf-8")
    return folder / name


def captions(source) -> dict[str, str]:
    return {key: source.caption(index) for index, key in enumerate(source.keys)}


def test_images_with_captions_beside_them_are_read_in_any_depth_and_capitals(tmp_path):
    write(tmp_path, "a.png", "a red square")
    write(tmp_path / "more", "b.JPG", "a blue\nsquare", ending=".caption")
    (tmp_path / "more" / "c.WebP").write_bytes(b"")
    write(tmp_path / "more", "c.WebP", "a dot", ending=".TXT")
    source = open_source(tmp_path)
    assert captions(source) == {
        "a.png": "a red square",
        "more/b.JPG": "a blue square",
        "more/c.WebP": "a dot",
    }
    pair = source.read(0)
    assert pair.mask is None
    assert pair.target[0, BOX[1], BOX[0]].tolist() == pytest.approx([200 / 255, 0, 0])


@pytest.mark.parametrize("place", ["masklabel", "MaskLabel", "underscore", "dot", "root", "beside"])
def test_masks_of_onetrainer_and_of_a_folder_masks_belong_to_their_images(tmp_path, place):
    write(tmp_path / "sub", "a.jpg", "a red square")
    write(tmp_path / "sub", "b.png", "a red square")
    where = {
        "masklabel": tmp_path / "sub" / "a-masklabel.png",
        "MaskLabel": tmp_path / "sub" / "a-MaskLabel.png",
        "underscore": tmp_path / "sub" / "a_mask.png",
        "dot": tmp_path / "sub" / "a.Mask.png",
        "root": tmp_path / "masks" / "sub" / "a.png",
        "beside": tmp_path / "sub" / "Masks" / "a.png",
    }[place]
    where.parent.mkdir(parents=True, exist_ok=True)
    mask().save(where)
    source = open_source(tmp_path, "not a target of its own")
    assert source.keys == ("sub/a.jpg", "sub/b.png")
    assert source.files(0) == tuple(
        str(path) for path in (tmp_path / "sub" / "a.jpg", where, tmp_path / "sub" / "a.txt")
    )
    with_mask, without = source.read(0), source.read(1)
    assert with_mask.mask is not None
    assert with_mask.mask[0, BOX[1], BOX[0]] == 1
    assert with_mask.mask[0, 0, 0] == 0
    assert without.mask is None


def test_kohyas_folders_give_captions_and_weights(tmp_path):
    write(tmp_path / "20_red toy", "a.png")
    write(tmp_path / "10_blue toy", "b.png", "a blue toy on a table")
    assert captions(open_source(tmp_path)) == {
        "10_blue toy/b.png": "a blue toy on a table",
        "20_red toy/a.png": "red toy",
        "20_red toy/a.png#2": "red toy",
    }


def test_a_folder_called_by_a_year_is_not_repeated(tmp_path):
    write(tmp_path / "2019_holiday", "a.png", "a red square")
    write(tmp_path / "2020_holiday", "b.png", "a red square")
    assert open_source(tmp_path).keys == ("2019_holiday/a.png", "2020_holiday/b.png")


def test_an_image_of_a_mask_with_a_caption_is_a_target(tmp_path):
    write(tmp_path, "cat.png", "a cat")
    write(tmp_path, "cat-mask.png", "a cat in a mask")
    assert set(captions(open_source(tmp_path)).values()) == {"a cat", "a cat in a mask"}


def test_conditioning_images_and_masks_of_no_image_are_no_targets(tmp_path, caplog):
    write(tmp_path / "10_toy", "a.png")
    write(tmp_path / "10_toy", "a-condlabel.png")
    write(tmp_path / "10_toy", "b-masklabel.png")
    write(tmp_path / "10_toy", "c_mask.png")
    with caplog.at_level(logging.INFO):
        assert open_source(tmp_path).keys == ("10_toy/a.png",)
    assert "not read: 3 .png" in caplog.text


def test_one_caption_serves_all_that_have_none(tmp_path):
    write(tmp_path / "5_toy", "a.png")
    write(tmp_path, "b.png", "a red square")
    source = open_source(tmp_path, "a toy")
    assert captions(source)["b.png"] == "a red square"
    assert captions(source)["5_toy/a.png"] == "a toy"
    assert fingerprint(source) != fingerprint(open_source(tmp_path, "another toy"))


def test_what_is_left_out_is_named_or_counted(tmp_path, caplog):
    write(tmp_path, "a.png", "a red square")
    write(tmp_path, "bare.png")
    write(tmp_path, "twice.png", "a red square")
    write(tmp_path, "twice.jpg")
    for name in ("a.npz", "b.npz", "lost.txt", "notes"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write(tmp_path / ".ipynb_checkpoints", "c.png", "hidden")
    with caplog.at_level(logging.INFO):
        source = open_source(tmp_path)
    assert source.keys == ("a.png",)
    assert len(source.problems) == 2
    assert "bare.png: it has no caption; add bare.txt" in source.problems[0]
    assert "twice.jpg and twice.png have one name" in source.problems[1]
    assert (
        "1 images, 0 with a mask of their own; not read: 2 .npz, 1 .txt, 1 without an ending"
        in caplog.text
    )


def test_a_folder_without_captions_says_what_to_do(tmp_path):
    write(tmp_path, "a.png")
    with pytest.raises(InputError, match=r"add a\.txt, or give caption, one text"):
        open_source(tmp_path)


def test_a_cut_out_is_its_own_mask_and_a_target_on_white(tmp_path):
    cut_out = make_image().convert("RGBA")
    cut_out.putalpha(mask())
    cut_out.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red square", encoding="utf-8")
    pair = open_source(tmp_path).read(0)
    assert pair.mask is not None
    assert torch.equal(pair.target[0, 0, 0], torch.ones(3))
    assert pair.target[0, BOX[1], BOX[0], 0] == pytest.approx(200 / 255)
    assert not pair.has_hidden_pixels


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("text", ["text", "caption"])
def test_an_image_folder_of_hugging_face_is_read_by_its_metadata(tmp_path, form, text):
    write(tmp_path, "a.png")
    mask().save(tmp_path / "a_m.png")
    row = {"file_name": "a.png", text: "a red square", "mask": "a_m.png"}
    lines = json.dumps(row) if form == "jsonl" else f"{','.join(row)}\n{','.join(row.values())}"
    (tmp_path / f"metadata.{form}").write_text(lines, encoding="utf-8")
    source = open_source(tmp_path)
    assert captions(source) == {"a.png": "a red square"}
    assert source.read(0).mask is not None


def test_images_that_a_list_leaves_out_are_named(tmp_path, caplog):
    for name in ("a.png", "b.png", "sub/c.png"):
        write((tmp_path / name).parent, Path(name).name)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    source = open_source(tmp_path)
    assert source.keys == ("a.png",)
    assert (
        "what metadata.csv lists is read; 2 other files are not (b.png, sub/c.png)" in caplog.text
    )
    assert check_source(source, resolution=64).problems.keys() == {LEFT_OUT}


def test_masks_of_no_image_and_texts_of_no_image_are_named(tmp_path, caplog):
    write(tmp_path / "5_bag", "A.png")
    for name in ("a.txt", "masks/a.png", "masks/b.png", "masks/A.bmp", "masks/A.png"):
        (tmp_path / "5_bag" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "5_bag" / name).write_bytes(b"")
    assert open_source(tmp_path).keys == ("5_bag/A.png",)
    assert "3 files in folders masks are the mask of no image" in caplog.text
    assert "5_bag/masks/A.png" in caplog.text
    assert "not read: 1 .txt. A text has the name of its image" in caplog.text


def test_an_accent_may_be_written_in_two_ways(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    write(tmp_path, f"{composed}.png")
    (tmp_path / f"{apart}.txt").write_text("a cup")
    (tmp_path / "masks").mkdir()
    mask().save(tmp_path / "masks" / f"{apart}.png")
    source = open_source(tmp_path)
    assert source.caption(0) == "a cup"
    assert source.read(0).mask is not None


def test_two_layouts_in_one_folder_are_named(tmp_path, caplog):
    write_pair(tmp_path, "one")
    write(tmp_path, "a.png", "a red square")
    source = open_source(tmp_path)
    assert source.keys == ("one",)
    assert "1 other files are not (a.png)" in caplog.text
    assert check_source(source, resolution=64).problems.keys() == {LEFT_OUT}
    make_image().save(tmp_path / "b.png")
    for form, text in (
        ("jsonl", '{"file_name": "b.png", "text": "x"}'),
        ("csv", "file_name,text\nb.png,x"),
    ):
        (tmp_path / f"metadata.{form}").write_text(text, encoding="utf-8")
    assert open_source(tmp_path).keys == ("b.png",)
    assert "metadata.jsonl is read, metadata.csv is not" in caplog.text


def test_no_source_file_is_changed(tmp_path):
    write(tmp_path / "3_toy", "a.png")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    open_source(tmp_path).read(0)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_the_folder_itself_may_be_a_concept_with_repeats(tmp_path):
    write(tmp_path / "10_red mug", "a.png")
    assert captions(open_source(tmp_path / "10_red mug")) == {"a.png": "red mug"}


def test_repeated_images_are_looked_through_once(tmp_path):
    for folder, name in (("10_red mug", "a.png"), ("10_red mug", "b.png"), ("1_cat", "c.png")):
        write(tmp_path / folder, name)
    (tmp_path / "10_red mug" / "b.png").write_bytes(b"no image")
    source = open_source(tmp_path)
    assert len(source.keys) == 21
    once = ["10_red mug/a.png", "10_red mug/b.png", "1_cat/c.png"]
    assert [source.keys[index] for index in source.distinct] == once
    report = check_source(source, resolution=64)
    assert (report.num_pairs, report.num_samples) == (3, 21)
    assert len(report.problems[UNREADABLE]) == 1
    assert spread(source, 8) == list(source.distinct)
    assert len(spread(source, 2)) == 2


def test_a_mask_of_the_background_is_turned_round_and_named(tmp_path):
    write(tmp_path, "a.png", "a red square")
    (tmp_path / "masks").mkdir()
    ImageOps.invert(mask()).save(tmp_path / "masks" / "a.png")
    source = open_source(tmp_path)
    pair = source.read(0)
    assert pair.is_turned
    assert pair.mask is not None
    mask().save(tmp_path / "masks" / "a.png")
    right = open_source(tmp_path).read(0)
    assert not right.is_turned
    assert torch.equal(pair.mask, right.mask)
