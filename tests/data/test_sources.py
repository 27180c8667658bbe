"""Training sets on disk: every form gives the same pairs, and what is damaged is named."""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreamcache_core.data.sources.folder import FolderSource
from dreamcache_core.data.sources.manifest import ManifestSource
from dreamcache_core.data.sources.opening import open_source
from dreamcache_core.data.sources.reading import MaskError, image_size
from dreamcache_core.data.sources.shards import ShardSource
from dreamcache_core.data.sources.source import fingerprint
from dreamcache_core.errors import DreamCacheError, FileFormatError, InputError
from dreamcache_core.images.files import read_image

WIDTH, HEIGHT = 24, 16
BOX = (6, 2, 18, 14)


def make_image(red: int = 200) -> Image.Image:
    """A square of some red on blue; wider than high."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 255))
    image.paste((red, 0, 0), BOX)
    return image


def mask(size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    image = Image.new("L", size, 0)
    image.paste(255, BOX if size[0] <= WIDTH else (12, 4, 36, 28))
    return image


def write_pair(folder: Path, stem: str, red: int = 200, caption: str = "a red square") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    make_image(red).save(folder / f"{stem}_generation.png")
    mask().save(folder / f"{stem}_mask.png")
    (folder / f"{stem}_caption.txt").write_text(caption, encoding="utf-8")


def write_lines(path: Path, *entries: object) -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(key: str, red: int = 200) -> dict[str, bytes]:
    return {
        f"{key}.generation.png": encoded(make_image(red)),
        f"{key}.mask.png": encoded(mask()),
        f"{key}.caption.txt": b"a red square",
    }


def red_of(image: torch.Tensor) -> int:
    """Red of the middle of an image, 0 to 255."""
    return round(float(image[0, HEIGHT // 2, WIDTH // 2, 0]) * 255)


# --- folders


def test_folder_gives_pairs_of_any_depth_in_the_order_of_their_names(tmp_path: Path):
    write_pair(tmp_path / "dog", "1", red=11)
    write_pair(tmp_path / "a cat" / "second litter", "0 b", red=22, caption="two\n words ")
    write_pair(tmp_path, "9", red=33)
    write_pair(tmp_path / "dog", "0", red=44)
    source = FolderSource(tmp_path)
    assert source.keys == ("9", "a cat/second litter/0 b", "dog/0", "dog/1")
    assert [red_of(source.read(i).target) for i in range(4)] == [33, 22, 44, 11]
    assert source.caption(1) == source.read(1).caption == "two words"
    assert source.problems == ()


def test_folder_pair_is_its_own_subject_under_its_mask(tmp_path: Path):
    write_pair(tmp_path, "0")
    source = FolderSource(tmp_path)
    pair = source.read(0)
    assert pair.target.shape == (1, HEIGHT, WIDTH, 3)
    assert pair.subject is pair.target
    assert pair.mask is not None
    expected = torch.zeros(1, HEIGHT, WIDTH)
    expected[:, 2:14, 6:18] = 1
    assert torch.equal(pair.mask, expected)
    assert source.size(0) == (HEIGHT, WIDTH)
    assert [Path(file).name for file in source.files(0)] == [
        "0_generation.png",
        "0_mask.png",
        "0_caption.txt",
    ]


def test_equal_stems_in_several_folders_are_different_pairs(tmp_path: Path):
    for red, name in ((1, "b"), (2, "a"), (3, "c")):
        write_pair(tmp_path / name, "0", red=red)
    source = FolderSource(tmp_path)
    assert source.keys == ("a/0", "b/0", "c/0")
    assert [red_of(source.read(i).target) for i in range(3)] == [2, 1, 3]


def test_incomplete_pairs_are_left_out_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for stem in "abcde":
        write_pair(tmp_path, stem)
    (tmp_path / "a_mask.png").unlink()
    (tmp_path / "b_caption.txt").unlink()
    (tmp_path / "c_generation.png").unlink()
    make_image().save(tmp_path / "d_generation.jpg")
    source = FolderSource(tmp_path)
    assert source.keys == ("e",)
    assert [text.split(":")[0] for text in source.problems] == ["a", "b", "c", "d"]
    assert "no _mask.png" in source.problems[0]
    assert "no _caption.txt" in source.problems[1]
    assert "no _generation.png" in source.problems[2]
    assert "d_generation.jpg and d_generation.png are two files" in source.problems[3]
    (record,) = caplog.records
    assert "4 of 5 samples are left out" in record.getMessage()


def test_folder_without_a_complete_pair_is_refused_with_the_reason(tmp_path: Path):
    write_pair(tmp_path, "a")
    (tmp_path / "a_mask.png").unlink()
    with pytest.raises(InputError, match=r"found none\. a: there is .*no _mask\.png"):
        FolderSource(tmp_path)


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path / ".trash", "b")
    (tmp_path / "._a_generation.png").write_bytes(b"resource fork")
    (tmp_path / "notes.txt").write_text("nothing")
    source = FolderSource(tmp_path)
    assert source.keys == ("a",)
    assert source.problems == ()


def test_linked_folders_are_read_and_circles_end(tmp_path: Path):
    write_pair(tmp_path / "elsewhere", "0")
    write_pair(tmp_path / "set" / "dog", "1")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "dog" / "circle").symlink_to(tmp_path / "set")
    assert FolderSource(tmp_path / "set").keys == ("cat/0", "dog/1")


def test_file_name_that_is_no_unicode_gives_a_printable_key(tmp_path: Path):
    write_pair(tmp_path, "x")
    for file in tmp_path.iterdir():
        target = os.fsencode(file).replace(b"x_", b"\xff_")
        try:
            os.rename(file, target)
        except OSError:
            pytest.skip("this file system takes Unicode names alone")
    source = FolderSource(tmp_path)
    assert source.keys[0].isascii()
    assert len(fingerprint(source)) == 64
    assert red_of(source.read(0).target) == 200


def test_caption_in_another_encoding_is_refused_by_name(tmp_path: Path):
    write_pair(tmp_path, "a")
    (tmp_path / "a_caption.txt").write_bytes("caf\u00e9".encode("latin-1"))
    source = FolderSource(tmp_path)
    with pytest.raises(FileFormatError, match=r"UTF-8, got .*a_caption\.txt"):
        source.read(0)


def test_byte_order_mark_is_no_part_of_the_caption_and_empty_ones_stay_empty(tmp_path: Path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b", caption=" \n")
    (tmp_path / "a_caption.txt").write_text("a dog", encoding="utf-8-sig")
    source = FolderSource(tmp_path)
    assert [source.caption(0), source.read(1).caption] == ["a dog", ""]


def test_cmyk_and_16_bit_images_are_read(tmp_path: Path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    (tmp_path / "a_generation.png").unlink()
    make_image().convert("CMYK").save(tmp_path / "a_generation.jpg", quality=95)
    grey = Image.new("I;16", (WIDTH, HEIGHT), 32768)
    grey.save(tmp_path / "b_generation.png")
    deep = Image.new("I;16", (WIDTH, HEIGHT), 0)
    deep.paste(65535, BOX)
    deep.save(tmp_path / "b_mask.png")
    source = FolderSource(tmp_path)
    cmyk, grey = source.read(0), source.read(1)
    assert abs(red_of(cmyk.target) - 200) < 8
    assert torch.allclose(grey.target, torch.tensor(32768 / 65535))
    assert grey.mask is not None
    assert grey.mask.sum() == 144


def test_truncated_huge_and_foreign_files_are_refused_by_name(tmp_path: Path):
    for stem in "abc":
        write_pair(tmp_path, stem)
    whole = (tmp_path / "a_generation.png").read_bytes()
    (tmp_path / "a_generation.png").write_bytes(whole[:60])
    (tmp_path / "b_mask.png").write_bytes(b"<html>not found</html>")
    Image.new("1", (20_000, 6_000)).save(tmp_path / "c_generation.png")
    source = FolderSource(tmp_path)
    with pytest.raises(FileFormatError, match=r"a_generation\.png.*cannot be read"):
        source.read(0)
    with pytest.raises(FileFormatError, match=r"b_mask\.png, which is a web page"):
        source.read(1)
    for ask in (source.read, source.size):
        with pytest.raises(InputError, match=r"c_generation\.png: 20000 x 6000 pixels"):
            ask(2)
    assert source.size(0) == (HEIGHT, WIDTH)  # the header is whole


def test_empty_and_misfit_masks_are_refused_by_name_others_resized(tmp_path: Path):
    for stem in "abc":
        write_pair(tmp_path, stem)
    Image.new("L", (WIDTH, HEIGHT), 0).save(tmp_path / "a_mask.png")
    mask((HEIGHT, WIDTH)).save(tmp_path / "b_mask.png")
    mask((2 * WIDTH, 2 * HEIGHT)).save(tmp_path / "c_mask.png")
    source = FolderSource(tmp_path)
    with pytest.raises(MaskError, match=r"a_mask\.png: .*an empty one"):
        source.read(0)
    with pytest.raises(MaskError, match=r"b_mask\.png: .*24 x 16 .*16 x 24"):
        source.read(1)
    resized = source.read(2).mask
    assert resized is not None
    assert resized.shape == (1, HEIGHT, WIDTH)
    assert resized.sum() == 144


def test_alpha_and_mask_of_an_image_are_multiplied(tmp_path: Path):
    write_pair(tmp_path, "a")
    image = make_image()
    alpha = Image.new("L", (WIDTH, HEIGHT), 255)
    alpha.paste(0, (0, 0, 12, HEIGHT))
    image.putalpha(alpha)
    image.save(tmp_path / "a_generation.png")
    pair = FolderSource(tmp_path).read(0)
    assert pair.target.shape[-1] == 3
    assert pair.mask is not None
    assert pair.mask.sum() == 72  # the right half of 12 x 12


def test_size_is_that_of_the_upright_image(tmp_path: Path):
    write_pair(tmp_path, "a")
    (tmp_path / "a_generation.png").unlink()
    sideways = Image.Exif()
    sideways[0x0112] = 6
    make_image().transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "a_generation.jpg", exif=sideways
    )
    source = FolderSource(tmp_path)
    assert source.size(0) == tuple(source.read(0).target.shape[1:3]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["tif", "png", "late png"])
def test_size_is_that_of_the_upright_image_in_other_formats(tmp_path: Path, kind: str):
    sideways = Image.Exif()
    sideways[0x0112] = 6
    path = tmp_path / f"a.{kind[-3:]}"
    make_image().transpose(Image.Transpose.ROTATE_90).save(path, exif=sideways)
    if kind == "late png":
        data = path.read_bytes()
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        place = data.index(b"IEND") - 4
        path.write_bytes(data[:start] + data[end:place] + data[start:end] + data[place:])
    assert image_size(path) == tuple(read_image(path)[0].shape[1:3]) == (HEIGHT, WIDTH)


def test_png_that_is_cut_after_its_header_has_a_size_still(tmp_path: Path):
    make_image().save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for end in range(whole.index(b"IDAT") + 4, len(whole)):
        (tmp_path / "a.png").write_bytes(whole[:end])
        assert image_size(tmp_path / "a.png") == (HEIGHT, WIDTH)


def test_nearly_black_mask_is_refused_with_the_cure(tmp_path: Path):
    write_pair(tmp_path, "a")
    mask().point([0, *[1] * 255]).save(tmp_path / "a_mask.png")
    with pytest.raises(MaskError, match=r"values up to 0\.0039 of 1, .*; save white as 255"):
        FolderSource(tmp_path).read(0)
    Image.new("L", (WIDTH, HEIGHT), 0).save(tmp_path / "a_mask.png")
    with pytest.raises(MaskError, match=r"the mask\.$"):
        FolderSource(tmp_path).read(0)


def test_opening_a_set_reads_no_file(tmp_path: Path):
    for index in range(10):
        (tmp_path / f"{index:03d}").mkdir()
        for stem in range(10):
            for end in ("generation.png", "mask.png", "caption.txt"):
                (tmp_path / f"{index:03d}" / f"{stem}_{end}").touch()
    # every file is empty, and to read one is an error
    assert len(FolderSource(tmp_path).keys) == 100


# --- manifests


def test_manifest_reads_images_beside_it_with_mask_partner_or_alpha(tmp_path: Path):
    (tmp_path / "p").mkdir()
    make_image(10).save(tmp_path / "p" / "a b.png")
    make_image(20).save(tmp_path / "p" / "partner.png")
    mask().save(tmp_path / "m.png")
    cut = make_image(30)
    cut.putalpha(mask())
    cut.save(tmp_path / "cut.png")
    path = write_lines(
        tmp_path / "set.jsonl",
        {"image": "p/a b.png", "caption": "one", "mask": "m.png"},
        {"image": "p/a b.png", "caption": "two", "mask": "m.png", "subject": "p/partner.png"},
        "",
        {"image": "cut.png", "caption": "three", "mask": None},
        {"image": str(tmp_path / "p" / "partner.png"), "caption": "four"},
    )
    source = ManifestSource(path)
    assert source.keys[:3] == ("p/a b.png", "p/a b.png#2", "cut.png")
    pairs = [source.read(i) for i in range(4)]
    assert [pair.caption for pair in pairs] == ["one", "two", "three", "four"]
    assert [red_of(pair.target) for pair in pairs] == [10, 10, 30, 20]
    assert [red_of(pair.subject) for pair in pairs] == [10, 20, 30, 20]
    assert [pair.mask is not None and int(pair.mask.sum()) for pair in pairs] == [
        144,
        144,
        144,
        False,
    ]
    assert source.size(0) == (HEIGHT, WIDTH)
    assert len(source.files(1)) == 3


def test_manifest_keys_are_unique_where_an_image_is_named_like_a_repetition(tmp_path: Path):
    for name in ("a.tif", "a.tif#2"):
        make_image().save(tmp_path / name, format="TIFF")
    for names in (("a.tif", "a.tif", "a.tif#2"), ("a.tif#2", "a.tif", "a.tif", "a.tif#2")):
        rows = [{"image": name, "caption": "x"} for name in names]
        keys = ManifestSource(write_lines(tmp_path / "set.jsonl", *rows)).keys
        assert len(set(keys)) == len(names)


def test_a_key_that_a_line_gives_twice_is_refused(tmp_path: Path):
    make_image().save(tmp_path / "a.png")
    manifest = tmp_path / "set.jsonl"
    manifest.write_text('{"image": "a.png", "caption": "one", "caption": "two"}\n')
    with pytest.raises(InputError, match=r"line 1.*'caption' is given 2 times"):
        _ = ManifestSource(manifest)


def test_csv_and_jsonl_of_the_same_rows_give_the_same_pairs(tmp_path: Path):
    make_image(10).save(tmp_path / "a, b.png")
    mask().save(tmp_path / "m.png")
    rows = [{"image": "a, b.png", "caption": 'a "red", square', "mask": "m.png"}] * 2
    lines = write_lines(tmp_path / "set.jsonl", *rows)
    table = tmp_path / "set.csv"
    table.write_text(
        'image,caption,mask\r\n"a, b.png","a ""red"", square",m.png\r\n'
        + '"a, b.png","a ""red"",\nsquare",m.png\r\n',
        encoding="utf-8-sig",
    )
    one, other = ManifestSource(lines), ManifestSource(table)
    assert one.keys == other.keys == ("a, b.png", "a, b.png#2")
    for index in range(2):
        first, second = one.read(index), other.read(index)
        assert first.caption == second.caption == 'a "red", square'
        assert torch.equal(first.target, second.target)
        assert first.mask is not None
        assert second.mask is not None
        assert torch.equal(first.mask, second.mask)


def test_bad_lines_are_left_out_with_their_number(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_image().save(tmp_path / "a.png")
    path = write_lines(
        tmp_path / "set.jsonl",
        "{not json",
        {"image": "a.png", "caption": "good"},
        {"image": "gone.png", "caption": "x"},
        {"image": "a.png", "caption": "x", "mask": "gone mask.png"},
        {"image": "a.png"},
        {"image": 7, "caption": "x"},
        [1, 2],
        {"image": "a\0.png", "caption": "x"},
        {"image": "\ud800.png", "caption": "x"},
        {"image": "a.png", "caption": "good too", "subjekt": "b.png"},
    )
    source = ManifestSource(path)
    assert [source.caption(i) for i in range(2)] == ["good", "good too"]
    assert [text.split(":")[0] for text in source.problems] == [
        f"set.jsonl, line {number}" for number in (1, 7, 3, 4, 5, 6, 8, 9)
    ]
    assert "there is no" in source.problems[3]
    assert "gone mask.png" in source.problems[3]
    assert all("\ud800" not in text for text in source.problems)
    assert "subjekt are not read" in caplog.text


def test_csv_row_that_ends_early_is_left_out(tmp_path: Path):
    make_image().save(tmp_path / "a.png")
    path = write_lines(tmp_path / "set.csv", "image,caption", "a.png,good", "a.png")
    source = ManifestSource(path)
    assert source.keys == ("a.png",)
    assert "line 3: a.png has no caption" in source.problems[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,caption", '"a.png","unclosed', "a.png,z"], "Mind the quotes"),
        (["file_name,text,text", "a.png,x,y"], "each column once"),
        (["image,caption,mask,mask", "a.png,x,,"], "each column once"),
    ],
)
def test_csv_that_can_be_read_in_two_ways_is_refused(
    tmp_path: Path, lines: list[str], message: str
):
    make_image().save(tmp_path / "a.png")
    with pytest.raises(DreamCacheError, match=message):
        open_source(write_lines(tmp_path / "set.csv", *lines))


@pytest.mark.parametrize("caption", ["0", "false", "[]", "{}"])
def test_caption_of_a_manifest_that_is_no_text_is_left_out(tmp_path: Path, caption: str):
    make_image().save(tmp_path / "a.png")
    lines = ['{"image": "a.png", "caption": "x"}', f'{{"image": "a.png", "caption": {caption}}}']
    (problem,) = open_source(write_lines(tmp_path / "set.jsonl", *lines)).problems
    assert "line 2: needs a text" in problem


def test_csv_without_the_columns_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "set.csv", "image;text", "a.png;x")
    with pytest.raises(InputError, match="image and caption missing"):
        ManifestSource(path)


def test_manifest_in_another_encoding_is_refused(tmp_path: Path):
    path = tmp_path / "set.csv"
    path.write_bytes("image,caption\na.png,caf\u00e9".encode("latin-1"))
    with pytest.raises(FileFormatError, match="UTF-8"):
        ManifestSource(path)


# --- shards


def test_shards_are_read_at_random_in_the_order_of_their_names(tmp_path: Path):
    write_tar(tmp_path / "b.tar", members("x/0 0", 10) | members("x/1", 20))
    write_tar(tmp_path / "a.tar", members("x/1", 30))
    write_tar(tmp_path / ".unfinished.tar", members("y", 1))
    source = ShardSource(tmp_path)
    assert source.keys == ("a/x/1", "b/x/0 0", "b/x/1")
    assert [red_of(source.read(i).target) for i in (2, 0, 1)] == [20, 30, 10]
    pair = source.read(1)
    assert pair.subject is pair.target
    assert pair.mask is not None
    assert pair.mask.sum() == 144
    assert source.caption(1) == "a red square"
    assert source.size(1) == (HEIGHT, WIDTH)
    assert source.files(1)[0].endswith("b.tar:x/0 0.generation.png")
    assert ShardSource(tmp_path / "a.tar").keys == ("a/x/1",)


def test_shard_pair_may_have_a_partner_without_mask(tmp_path: Path):
    parts = members("0", 10) | {"0.subject.png": encoded(make_image(20))}
    del parts["0.mask.png"]
    pair = ShardSource(write_tar(tmp_path / "a.tar", parts)).read(0)
    assert (red_of(pair.target), red_of(pair.subject), pair.mask) == (10, 20, None)


def test_incomplete_members_and_cut_shards_are_left_out(tmp_path: Path):
    incomplete = members("1")
    del incomplete["1.mask.png"]
    write_tar(tmp_path / "a.tar", members("0") | incomplete)
    whole = write_tar(tmp_path / "b.tar", members("0") | members("1")).read_bytes()
    # within the image of the second pair: three members of header and data, 512 to a block, and a header
    end = sum(512 + -(-len(data) // 512) * 512 for data in members("0").values()) + 512 + 40
    (tmp_path / "b.tar").write_bytes(whole[:end])
    source = ShardSource(tmp_path)
    assert source.keys == ("a/0", "b/0")
    assert "a.tar: 1 has no mask" in source.problems[0]
    assert "b.tar is cut short" in source.problems[1]


def test_what_is_no_plain_tar_is_refused_by_name(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"<html>" * 500)
    with pytest.raises(FileFormatError, match=r"uncompressed tar file, got .*a\.tar"):
        ShardSource(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.caption.txt"))
    with pytest.raises(FileFormatError, match=r"uncompressed tar file, got .*a\.tar"):
        ShardSource(tmp_path)


def test_damaged_members_are_named(tmp_path: Path):
    parts = members("0")
    parts["0.generation.png"] = parts["0.generation.png"][:60]
    parts |= {"1.generation.png": b"", "1.mask.png": b"", "1.caption.txt": b"\xff"}
    source = ShardSource(write_tar(tmp_path / "a.tar", parts))
    with pytest.raises(FileFormatError, match=r"a\.tar:0\.generation\.png, which cannot be read"):
        source.read(0)
    with pytest.raises(FileFormatError, match=r"a\.tar:1\.generation\.png"):
        source.size(1)
    with pytest.raises(FileFormatError, match=r"a\.tar:1\.caption\.txt"):
        source.caption(1)


# --- all forms


def every_form(folder: Path) -> dict[str, Path]:
    """The same two pairs in every form that needs no further package."""
    for red, stem in ((10, "0"), (20, "1")):
        write_pair(folder / "folder", stem, red)
    rows = [
        {
            "image": f"folder/{i}_generation.png",
            "mask": f"folder/{i}_mask.png",
            "caption": "a red square",
        }
        for i in range(2)
    ]
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "a.tar", members("0", 10) | members("1", 20))
    return {
        "folder": folder / "folder",
        "manifest": write_lines(folder / "set.jsonl", *rows),
        "shards": folder / "shards",
        "shard": folder / "shards" / "a.tar",
    }


@pytest.mark.parametrize("form", ["folder", "manifest", "shards", "shard"])
def test_every_form_is_recognised_gives_the_same_pairs_and_travels(tmp_path: Path, form: str):
    paths = every_form(tmp_path)
    source = pickle.loads(pickle.dumps(open_source(paths[form])))
    plain = open_source(paths["folder"])
    assert len(source.keys) == len(set(source.keys)) == 2
    for index in range(2):
        one, other = source.read(index), plain.read(index)
        assert torch.equal(one.target, other.target)
        assert one.mask is not None
        assert other.mask is not None
        assert torch.equal(one.mask, other.mask)
        assert source.caption(index) == one.caption == other.caption
        assert source.size(index) == plain.size(index)


@pytest.mark.parametrize("form", ["folder", "manifest", "shards", "shard"])
def test_stamps_are_those_of_a_copy_that_keeps_times_and_change_with_any_file(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
):
    path = every_form(tmp_path / "one")[form]
    stamps = [open_source(path).stamp(index) for index in range(2)]
    assert len(set(stamps)) == 2
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    place = path.relative_to(tmp_path / "one")
    copied = open_source(tmp_path / "two" / place)
    assert [copied.stamp(index) for index in range(2)] == stamps
    monkeypatch.chdir(tmp_path / "two")
    assert open_source(place).stamp(0) == stamps[0]
    for file in {name.split(".tar:")[0] + ".tar" * (".tar:" in name) for name in copied.files(0)}:
        state = os.stat(file)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        assert copied.stamp(0) != stamps[0]
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        with Path(file).open("ab") as stream:
            stream.write(b"more")
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert copied.stamp(0) != stamps[0]
        os.truncate(file, state.st_size)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert copied.stamp(0) == stamps[0]


def test_stamp_of_a_manifest_holds_the_caption_and_of_a_shard_the_place(tmp_path: Path):
    make_image().save(tmp_path / "a.png")
    path = tmp_path / "set.jsonl"
    one, other = (
        ManifestSource(write_lines(path, {"image": "a.png", "caption": caption})).stamp(0)
        for caption in ("one", "two")
    )
    assert one != other
    shard = write_tar(tmp_path / "a.tar", members("0", 10) | members("1", 10))
    source = ShardSource(shard)
    assert source.stamp(0) != source.stamp(1)


def test_stamp_of_a_file_that_vanished_is_refused_by_name(tmp_path: Path):
    write_pair(tmp_path, "a")
    source = FolderSource(tmp_path)
    (tmp_path / "a_mask.png").unlink()
    with pytest.raises(InputError, match=r"a_mask\.png, which was there before"):
        source.stamp(0)


def test_tar_without_a_pair_does_not_hide_the_images_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_pair(tmp_path, "a")
    write_tar(tmp_path / "backup.tar", {"notes.txt": b"nothing"})
    assert open_source(tmp_path).keys == ("a",)
    assert "its images are read, its tar files are not" in caplog.text
    (tmp_path / "backup.tar").write_bytes(b"no tar at all" * 100)
    assert open_source(tmp_path).keys == ("a",)
    (tmp_path / "a_mask.png").unlink()
    with pytest.raises(FileFormatError, match=r"uncompressed tar file, got .*backup\.tar"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["missing", "empty folder", "file.bin"])
def test_anything_else_is_refused_with_the_four_forms(tmp_path: Path, name: str):
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / name)
    for form in ("X_generation.png", ".jsonl or .csv", ".tar", ".parquet"):
        assert form in str(caught.value)


def test_files_that_vanish_after_opening_are_named(tmp_path: Path):
    for path in every_form(tmp_path).values():
        source = open_source(path)
        for file in source.files(0):
            Path(file.split(":")[0]).rename(tmp_path / "away")
            with pytest.raises(DreamCacheError, match=r"0_|a\.tar"):
                source.read(0)
            (tmp_path / "away").rename(file.split(":")[0])


# --- what vanishes, hangs or blows up


def test_every_kind_of_image_that_is_read_makes_a_pair(tmp_path: Path):
    for kind in ("png", "jpg", "webp", "bmp", "gif", "tif", "tiff"):
        write_pair(tmp_path, kind)
        with Image.open(tmp_path / f"{kind}_generation.png") as image:
            image.save(tmp_path / f"{kind}_x.{kind}")
        (tmp_path / f"{kind}_generation.png").unlink()
        (tmp_path / f"{kind}_x.{kind}").rename(tmp_path / f"{kind}_generation.{kind}")
    assert len(FolderSource(tmp_path).keys) == 7


def test_csv_row_with_more_cells_than_columns_is_named(tmp_path: Path):
    make_image().save(tmp_path / "a.png")
    path = write_lines(tmp_path / "set.csv", "image,caption", "a.png,good", "a.png,a dog, running")
    source = ManifestSource(path)
    assert source.keys == ("a.png",)
    assert "line 3: has more cells than columns" in source.problems[0]


def test_csv_with_empty_cells_at_the_end_or_a_column_without_a_name_is_read(tmp_path: Path):
    make_image().save(tmp_path / "a.png")
    path = write_lines(tmp_path / "set.csv", ",image,caption", "0,a.png,good", "1,a.png,too,,")
    source = ManifestSource(path)
    assert [source.caption(i) for i in range(2)] == ["good", "too"]
    assert not source.problems


@pytest.mark.parametrize("change", ["joined", "header", "end"])
def test_pairs_that_vanish_from_a_shard_are_named(tmp_path: Path, change: str):
    whole = write_tar(tmp_path / "a.tar", members("0")).read_bytes()
    end = sum(512 + -(-len(data) // 512) * 512 for data in members("0").values())
    more = write_tar(tmp_path / "b.tar", members("1")).read_bytes()
    (tmp_path / "b.tar").unlink()
    changed = {
        "joined": whole + more,
        "header": whole[:end] + b"x" * 512 + more,
        "end": whole[:end],
    }
    (tmp_path / "a.tar").write_bytes(changed[change])
    source = ShardSource(tmp_path)
    assert source.keys == ("a/0",)
    (problem,) = source.problems
    assert f"a.tar is cut short, damaged, or several tar files in one, at byte {end}" in problem


def test_links_and_doubles_in_a_shard_are_named(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [*members("0").items(), *members("0").items()]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name in members("1"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, "0.mask.png"
            tar.addfile(info)
    source = ShardSource(tmp_path)
    assert source.keys == ("a/0",)
    assert sum("is there twice" in text for text in source.problems) == 3
    assert sum("is a link" in text for text in source.problems) == 3


def test_keys_of_a_shard_may_have_dots_and_other_members_are_named(tmp_path: Path, caplog):
    named = {f"v1.0_dog{name[1:]}": data for name, data in members("0").items()}
    write_tar(tmp_path / "a.tar", named | {"b.jpg": b"", "c.txt": b"a dog", "c.d.txt": b""})
    assert ShardSource(tmp_path).keys == ("a/v1.0_dog",)
    assert "not read: 1 .jpg, 2 .txt." in caplog.text


@pytest.mark.parametrize("kind", [b"L", b"K"])
def test_tar_of_long_names_of_long_names_is_one_problem(tmp_path: Path, kind: bytes):
    info = tarfile.TarInfo("x")
    info.type = kind
    path = write_tar(tmp_path / "a.tar", members("0"))
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content.ljust(-(-len(content) // 512) * 512, b"\0") + info.tobuf() * 2000)
    (problem,) = ShardSource(tmp_path).problems
    assert "cut short or damaged" in problem


@pytest.mark.parametrize(
    "field", [b"-1", b"99999999999", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"abc", b"\0" * 12]
)
@pytest.mark.parametrize("start", [124, 136, 100, 329])
def test_tar_header_with_nonsense_numbers_is_one_problem_or_harmless(
    tmp_path: Path, field: bytes, start: int
):
    content = bytearray(write_tar(tmp_path / "a.tar", members("0") | members("1")).read_bytes())
    second = 512 + -(-len(members("0")["0.generation.png"]) // 512) * 512
    header = content[second : second + 512]
    header[start : start + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[second : second + 512] = header
    (tmp_path / "a.tar").write_bytes(content)
    try:
        source = ShardSource(tmp_path)
    except DreamCacheError:
        return
    assert len(source.keys) == 2 or source.problems


def test_images_beside_shards_are_not_passed_over_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_tar(tmp_path / "a.tar", members("0"))
    assert open_source(tmp_path).keys == ("a/0",)
    assert not caplog.records
    write_pair(tmp_path / "more", "1")
    assert open_source(tmp_path).keys == ("a/0",)
    assert "tar files are read; 3 other files are not (1_" in caplog.text


@pytest.mark.parametrize("name", ["b.tar.gz", "B.TGZ", "more/b.tar", "c.parquet"])
def test_shards_in_subfolders_or_compressed_are_not_passed_over_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
):
    write_tar(tmp_path / "a.tar", members("0"))
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.write_bytes((tmp_path / "a.tar").read_bytes())
    assert open_source(tmp_path).keys == ("a/0",)
    assert f"1 other files are not ({other.name})" in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes by name")
@pytest.mark.parametrize("name", ["a_caption.txt", "a_mask.png", "set.csv", "set.jsonl"])
def test_pipes_are_refused_and_not_waited_for(tmp_path: Path, name: str):
    write_pair(tmp_path, "a")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    path = tmp_path / name if name.startswith("set") else tmp_path
    with pytest.raises(DreamCacheError, match=r"Expected a"):
        open_source(path).read(0)


def test_captions_have_a_size_limit(tmp_path: Path):
    write_pair(tmp_path, "a", caption="word " * 20_000)
    with pytest.raises(FileFormatError, match=r"at most 65536 bytes of text in .*a_caption\.txt"):
        FolderSource(tmp_path).read(0)
    long = members("0") | {"0.caption.txt": b"word " * 20_000}
    with pytest.raises(FileFormatError, match=r"at most 65536 bytes of text in .*0\.caption\.txt"):
        ShardSource(write_tar(tmp_path / "a.tar", long)).caption(0)
