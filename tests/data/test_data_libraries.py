"""Training sets that other libraries read or write: Subjects200K by datasets, shards by webdataset, tokens."""

import builtins
import io
import logging
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipeline import TOKENS, tokenizer
from training_set import write_pairs

from dreamcache_core.cli.main import main
from dreamcache_core.data.packing import write_shards
from dreamcache_core.data.sources.folder import FolderSource
from dreamcache_core.data.sources.manifest import ManifestSource
from dreamcache_core.data.sources.opening import open_source
from dreamcache_core.data.sources.shards import UNFINISHED, ShardSource
from dreamcache_core.data.sources.subjects200k import Subjects200KSource
from dreamcache_core.errors import FileFormatError, InputError, MissingPackageError

pytestmark = pytest.mark.diffusers

datasets = pytest.importorskip("datasets")
webdataset = pytest.importorskip("webdataset")

SIDE = 64
GOOD = {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5}


@pytest.fixture(autouse=True, scope="module")
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def two_squares(left: int, right: int, border: int = 8, between: int = 16) -> bytes:
    """Squares of two reds in a grey frame; as PNG."""
    size = (2 * (SIDE + border) + between, SIDE + 2 * border)
    image = Image.new("RGB", size, (128, 128, 128))
    image.paste((left, 0, 0), (border, border, border + SIDE, border + SIDE))
    start = border + SIDE + between
    image.paste((right, 0, 0), (start, border, start + SIDE, border + SIDE))
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def row(image: bytes, rating=GOOD, **description):
    texts = {"item": "square", "description_0": "left text", "description_1": "right  text"}
    return {
        "image": {"bytes": image, "path": None},
        "collection": "collection_1",
        "quality_assessment": rating,
        "description": texts | description,
    }


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    table.cast_column("image", datasets.Image()).to_parquet(str(path))
    return path


@pytest.fixture
def subjects(tmp_path):
    """Two files as they are published: good, badly rated, never rated, without a text."""
    bad = GOOD | {"imageQuality": 4}
    files = (
        [row(two_squares(10, 20)), row(two_squares(30, 40), bad)],
        [row(two_squares(50, 60), None), row(two_squares(70, 80), description_1=None)],
    )
    for number, rows in enumerate(files):
        write_parquet(tmp_path / "set" / "data" / f"train-{number:05d}-of-00002.parquet", rows)
    return tmp_path / "set"


def reds(pair):
    return [round(float(image.mean((0, 1, 2))[0]) * 255) for image in (pair.target, pair.subject)]


def test_each_row_is_two_pairs_of_exactly_the_two_squares(subjects, caplog):
    with caplog.at_level(logging.INFO, logger="dreamcache_core"):
        source = open_source(subjects)
    assert isinstance(source, Subjects200KSource)
    assert source.keys == tuple(
        f"{number:07d}-{side}" for number in (0, 2, 3) for side in ("left", "right")
    )
    pairs = [source.read(index) for index in range(6)]
    assert [reds(pair) for pair in pairs] == [
        [10, 20],
        [20, 10],
        [50, 60],
        [60, 50],
        [70, 80],
        [80, 70],
    ]
    assert all(pair.target.shape == (1, SIDE, SIDE, 3) for pair in pairs)
    assert all(bool((pair.target[..., 1:] == 0).all()) for pair in pairs)  # nothing of the frame
    assert all(pair.mask is None for pair in pairs)
    assert [pair.caption for pair in pairs] == ["left text", "right text"] * 2 + ["left text", ""]
    assert source.caption(1) == "right text"
    assert source.size(3) == (SIDE, SIDE)
    assert "row 2, right" in source.files(3)[0]
    assert "1 of 4 rows are left out, as a quality score is below 5" in caplog.text


@pytest.mark.parametrize(
    ("border", "between"), [(0, 0), (0, 16), (16, 16), (8, 8), (8, 16)], ids=str
)
def test_squares_are_found_in_frames_of_any_width(tmp_path, border, between):
    data = two_squares(10, 20, border, between)
    source = Subjects200KSource(write_parquet(tmp_path / "a.parquet", [row(data)]))
    pair = source.read(1)
    assert reds(pair) == [20, 10]
    assert pair.target.shape == pair.subject.shape == (1, SIDE, SIDE, 3)
    assert not bool(pair.target[..., 1].any())


def test_subjects200k_travels_to_workers(subjects):
    source = pickle.loads(pickle.dumps(open_source(subjects)))
    assert reds(source.read(2)) == [50, 60]


def test_cache_of_parquet_files_lies_beside_them(subjects):
    open_source(subjects)
    assert (subjects / "data" / ".arrow").is_dir()
    assert open_source(subjects).keys[0] == "0000000-left"


def test_badly_rated_rows_alone_are_refused(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", [row(two_squares(1, 2), GOOD | {"imageQuality": 1})]
    )
    with pytest.raises(InputError, match="rated 5 or higher"):
        open_source(path)


def test_damaged_and_foreign_parquet_files_are_refused_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the library leaves its files open
        with pytest.raises(FileFormatError, match=r"Subjects200K in .*a\.parquet"):
            open_source(path)
    other = tmp_path / "b.parquet"
    datasets.Dataset.from_list([{"text": "x"}]).to_parquet(str(other))
    with pytest.raises(FileFormatError, match="columns image and description"):
        open_source(other)


@pytest.mark.parametrize(
    ("column", "value", "got"),
    [
        ("description", "left", "string"),
        ("description", 5, "int64"),
        ("description", ["left", "right"], "list<.*>"),
        (
            "description",
            {"description_0": 1, "description_1": 2},
            "struct<description_0: int64, .*>",
        ),
        ("description", {"description_0": "left"}, "struct<description_0: string>"),
        ("image", 5, "int64"),
        ("image", "a.png", "string"),
        ("image", {"path": "a.png"}, "struct<path: string>"),
        ("quality_assessment", 5, "int64"),
        ("quality_assessment", {"imageQuality": "5"}, "struct<imageQuality: string>"),
    ],
)
def test_columns_of_other_types_are_refused_before_rows_are_read(tmp_path, column, value, got):
    good = write_parquet(tmp_path / "set" / "a.parquet", [row(two_squares(1, 2))])
    other = good.with_name("b.parquet")
    rows = [row(two_squares(1, 2)) | {column: value}]
    datasets.Dataset.from_list(rows).to_parquet(str(other))
    with pytest.raises(
        FileFormatError, match=rf"column {column} in .*b\.parquet to be .*, got {got}\. Is this"
    ):
        open_source(other)
    with pytest.raises(FileFormatError, match=r"b\.parquet"):
        open_source(good.parent)
    assert not list(tmp_path.rglob(".arrow"))


def test_ratings_may_be_missing_or_of_any_number_type(tmp_path):
    ratings = [None, {"imageQuality": 5.0}, {"imageQuality": 5, "objectConsistency": None}]
    for number, rating in enumerate(ratings):
        path = write_parquet(tmp_path / f"{number}.parquet", [row(two_squares(1, 2), rating)])
        assert len(open_source(path).keys) == 2


def test_damaged_image_of_a_row_is_named(tmp_path):
    single = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(single, format="PNG")
    rows = [row(two_squares(10, 20)[:100]), row(single.getvalue()), row(b"")]
    source = Subjects200KSource(write_parquet(tmp_path / "a.parquet", rows))
    for index, message in ((0, "cannot be read"), (2, "two squares side by side"), (4, "there is")):
        with pytest.raises(FileFormatError, match=message) as caught:
            source.read(index)
        assert f"row {index // 2}, left" in str(caught.value)


def test_shards_that_are_written_give_back_the_set(tmp_path):
    source = FolderSource(write_pairs(tmp_path / "set", 5))
    shards = write_shards(source, tmp_path / "50% shards", max_count=2)
    assert [path.name for path in shards] == [f"shard-00000{n}.tar" for n in range(3)]
    assert [path.name for path in sorted((tmp_path / "50% shards").iterdir())] == [
        path.name for path in shards
    ]
    packed = ShardSource(tmp_path / "50% shards")
    assert len(packed.keys) == 5
    for index in range(5):
        one, other = packed.read(index), source.read(index)
        assert torch.equal(one.target, other.target)
        assert torch.equal(one.mask, other.mask)
        assert one.subject is one.target
        assert one.caption == other.caption


def test_shards_keep_partners_and_pairs_without_mask(tmp_path, subjects):
    write_shards(open_source(subjects), tmp_path / "shards")
    pair = ShardSource(tmp_path / "shards").read(0)
    assert (reds(pair), pair.mask) == ([10, 20], None)
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\na.png,x\n")
    write_shards(ManifestSource(tmp_path / "a.csv"), tmp_path / "whole")
    whole = ShardSource(tmp_path / "whole").read(0).mask
    assert torch.equal(whole, torch.ones(1, 10, 20))


# the library leaves the shard open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_what_webdataset_itself_reads(tmp_path):
    write_shards(FolderSource(write_pairs(tmp_path / "set", 2)), tmp_path / "shards")
    samples = list(
        webdataset.WebDataset(str(tmp_path / "shards" / "shard-000000.tar"), shardshuffle=False)
    )
    assert [sample["__key__"] for sample in samples] == ["00000000", "00000001"]
    assert samples[0]["caption.txt"] == b"a b"
    assert Image.open(io.BytesIO(samples[0]["generation.png"])).size == (96, 80)


def test_shards_that_webdataset_writes_are_read(tmp_path):
    files = FolderSource(write_pairs(tmp_path / "set", 1)).files(0)
    parts = {
        name: Path(path).read_bytes()
        for name, path in zip(("generation.png", "mask.png", "caption.txt"), files, strict=True)
    }
    with webdataset.ShardWriter(str(tmp_path / "%d.tar"), verbose=0) as writer:
        writer.write({"__key__": "some/key", **parts})
    assert ShardSource(tmp_path / "0.tar").keys == ("0/some/key",)


def test_same_set_gives_the_same_shards_byte_for_byte(tmp_path):
    source = FolderSource(write_pairs(tmp_path / "set", 2))
    one, other = (write_shards(source, tmp_path / name)[0] for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()


def test_unreadable_pair_is_named_and_no_shard_appears(tmp_path):
    folder, out = write_pairs(tmp_path / "set", 3), tmp_path / "shards"
    (folder / "subject_1" / "001_generation.png").write_bytes(b"nothing")
    with pytest.raises(
        InputError, match=r"subject_1/001 \(.*001_mask\.png.*cannot be read"
    ) as told:
        write_shards(FolderSource(folder), out, max_count=1)
    assert "whole shards are kept" in str(told.value)
    assert [path.name for path in out.iterdir()] == [UNFINISHED]
    assert [path.suffix for path in (out / UNFINISHED).iterdir()] == [".tar"] * 2
    with pytest.raises(InputError, match="writing them was interrupted"):
        open_source(out)


@pytest.mark.parametrize("cure", ["mend", "remove"])
def test_packing_goes_on_where_it_was_interrupted(tmp_path, cure):
    folder, out = write_pairs(tmp_path / "set", 4), tmp_path / "shards"
    bad = folder / "subject_1" / "003_generation.png"  # the last of four
    whole = bad.read_bytes()
    bad.write_bytes(b"nothing")
    with pytest.raises(InputError):
        write_shards(FolderSource(folder), out, max_count=1)
    if cure == "mend":
        bad.write_bytes(whole)
    else:
        bad.unlink()
        (folder / "subject_1" / "003_mask.png").unlink()
        (folder / "subject_1" / "003_caption.txt").unlink()
    finished = {path.stat().st_ino for path in (out / UNFINISHED).iterdir()}
    shards = write_shards(FolderSource(folder), out, max_count=1)
    assert len(finished) == 3
    assert finished <= {path.stat().st_ino for path in shards}
    again = write_shards(FolderSource(folder), tmp_path / "at once", max_count=1)
    assert sorted(out.iterdir()) == shards
    assert [path.read_bytes() for path in shards] == [path.read_bytes() for path in again]
    with pytest.raises(InputError, match="empty or new folder"):
        write_shards(FolderSource(folder), out)


def test_packing_does_not_keep_what_was_changed_since(tmp_path):
    folder, out = write_pairs(tmp_path / "set", 3), tmp_path / "shards"
    bad = folder / "subject_1" / "001_generation.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"nothing")
    with pytest.raises(InputError):
        write_shards(FolderSource(folder), out, max_count=1)
    bad.write_bytes(whole)
    (folder / "subject_0" / "000_caption.txt").write_text("another text")
    shards = write_shards(FolderSource(folder), out, max_count=1)
    assert ShardSource(out).caption(0) == "another text"
    assert sorted(out.iterdir()) == shards


def test_stamps_of_subjects200k_are_those_of_a_copy_and_change_with_the_files(subjects, tmp_path):
    one = open_source(subjects)
    stamps = [one.stamp(index) for index in range(6)]
    assert stamps[0] == stamps[1] != stamps[2]
    shutil.copytree(subjects, tmp_path / "copy", ignore=shutil.ignore_patterns(".arrow"))
    copy = open_source(tmp_path / "copy")
    assert [copy.stamp(index) for index in range(6)] == stamps
    file = next((tmp_path / "copy" / "data").glob("*.parquet"))
    os.utime(file, ns=(0, 1))
    assert open_source(tmp_path / "copy").stamp(0) != stamps[0]


def test_parquet_file_of_something_else_does_not_hide_the_images_beside_it(tmp_path, caplog):
    folder = write_pairs(tmp_path / "set", 1)
    datasets.Dataset.from_list([{"text": "x"}]).to_parquet(str(folder / "b.parquet"))
    assert open_source(folder).keys == ("subject_0/000",)
    assert "its images are read, its parquet files are not" in caplog.text


def test_command_packs_a_set_that_training_then_reads_as_before(tmp_path, capsys):
    folder, out = write_pairs(tmp_path / "set", 5), tmp_path / "shards"
    assert main(["dataset", "shard", str(folder), str(out), "--max-count", "3"]) == 0
    assert f"5 pairs in 2 shards: {out}" in capsys.readouterr().out
    packed, source = open_source(out), open_source(folder)
    assert [packed.keys[0], packed.keys[3]] == ["shard-000000/00000000", "shard-000001/00000003"]
    for index in range(5):
        assert torch.equal(packed.read(index).target, source.read(index).target)
        assert packed.caption(index) == source.caption(index)


@pytest.mark.parametrize(
    ("out", "arguments", "message"),
    [
        ("full", (), "full holds something"),
        ("full/note.txt", (), "note.txt holds something"),
        ("new", ("--max-count", "0"), "max_count must be at least 1"),
    ],
)
def test_command_packs_nothing_into_a_folder_that_holds_something(
    tmp_path, capsys, out, arguments, message
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    folder = write_pairs(tmp_path / "set", 1)
    assert main(["dataset", "shard", str(folder), str(tmp_path / out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]


def test_check_counts_tokens_over_the_limit(tmp_path, capsys):
    folder = write_pairs(tmp_path / "set", 2)
    (folder / "subject_0" / "000_caption.txt").write_text("a" * 20)
    words = tokenizer(tmp_path / "files")
    words.save_pretrained(tmp_path / "model" / "tokenizer")
    arguments = ["dataset", "check", str(folder), "--samples", "0", "--tokenizer"]
    for given in ("model", "model/tokenizer"):
        assert main([*arguments, str(tmp_path / given)]) == 0
        printed = capsys.readouterr().out
        assert "captions: 4 to 22 tokens, median 4" in printed
        assert f"captions of more than {TOKENS} tokens" in printed
        assert "cuts off: 1\n  subject_0/000\n" in printed


def test_folder_without_a_tokenizer_is_refused(tmp_path, capsys):
    folder = write_pairs(tmp_path / "set", 1)
    assert main(["dataset", "check", str(folder), "--tokenizer", str(folder)]) == 2
    assert "Expected a tokenizer in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("datasets", lambda folder: open_source(folder / "a.parquet")),
        ("webdataset", lambda folder: write_shards(FolderSource(folder / "set"), folder / "out")),
    ],
)
def test_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, package, use):
    write_pairs(tmp_path / "set", 1)
    (tmp_path / "a.parquet").touch()
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"dreamcache\[train\]"):
        use(tmp_path)
