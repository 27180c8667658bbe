"""``dreamcache dataset check``: what it counts, what it complains of, and how it ends."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dreamcache_core.cli.main import main
from dreamcache_core.data import checking
from dreamcache_core.data.checking import (
    BAD_MASK,
    FULL_MASK,
    LEFT_OUT,
    NO_CAPTION,
    UNREADABLE,
    WEAK_MASK,
    check_source,
    training_sheet,
)
from dreamcache_core.data.sources.folder import FolderSource
from dreamcache_core.data.sources.manifest import ManifestSource
from dreamcache_core.errors import FileFormatError
from dreamcache_core.images.files import read_image


def write_pair(
    folder: Path,
    stem: str,
    *,
    size: tuple[int, int] = (90, 60),
    box: tuple[int, int, int, int] = (20, 10, 50, 40),
    caption: str = "a red square",
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image, mask = Image.new("RGB", size, (0, 0, 255)), Image.new("L", size, 0)
    image.paste((200, 0, 0), box)
    mask.paste(255, box)
    image.save(folder / f"{stem}_generation.png")
    mask.save(folder / f"{stem}_mask.png")
    (folder / f"{stem}_caption.txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    """Two good pairs and one of each flaw."""
    folder = tmp_path / "set"
    write_pair(folder / "dog", "0", caption="a dog")
    write_pair(folder / "dog", "1", size=(60, 90), box=(10, 20, 40, 50))
    write_pair(folder / "flaws", "cut")
    whole = (folder / "flaws" / "cut_generation.png").read_bytes()
    (folder / "flaws" / "cut_generation.png").write_bytes(whole[: len(whole) // 2])
    write_pair(folder / "flaws", "empty", box=(0, 0, 0, 0))
    write_pair(folder / "flaws", "full", box=(0, 0, 90, 60))
    write_pair(folder / "flaws", "mute", caption="")
    write_pair(folder / "flaws", "single")
    (folder / "flaws" / "single_mask.png").unlink()
    return folder


def test_report_counts_pairs_sizes_words_and_each_flaw_with_its_file(flawed: Path):
    report = check_source(FolderSource(flawed), resolution=64)
    assert report.num_pairs == 6
    assert report.sizes == {(60, 90): 3, (90, 60): 1}
    assert report.num_enlarged == 4
    assert report.num_without_mask == 0
    assert sorted(report.caption_words) == [0, 2, 3, 3]
    assert report.caption_tokens is None
    assert {kind: len(messages) for kind, messages in report.problems.items()} == {
        LEFT_OUT: 1,
        UNREADABLE: 1,
        BAD_MASK: 1,
        FULL_MASK: 1,
        NO_CAPTION: 1,
    }
    for kind, name in (
        (LEFT_OUT, "single_generation.png"),
        (UNREADABLE, "cut_generation.png"),
        (BAD_MASK, "empty_mask.png"),
        (FULL_MASK, "full_mask.png"),
        (NO_CAPTION, "mute_caption.txt"),
    ):
        assert name in report.problems[kind][0]


def test_pairs_without_mask_are_counted_and_no_flaw(tmp_path: Path):
    Image.new("RGB", (80, 64)).save(tmp_path / "a.png")
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"image": "a.png", "caption": "x"}), encoding="utf-8")
    report = check_source(ManifestSource(path), resolution=64)
    assert (report.num_without_mask, report.num_enlarged, report.problems) == (1, 0, {})


@pytest.mark.parametrize(("white", "is_weak"), [(43, True), (229, True), (230, False)])
def test_masks_that_never_reach_white_are_a_flaw(tmp_path: Path, white: int, is_weak: bool):
    write_pair(tmp_path, "0")
    file = tmp_path / "0_mask.png"
    with Image.open(file) as mask:
        weak = mask.point([0, *[white] * 255])
    weak.save(file)
    problems = check_source(FolderSource(tmp_path), resolution=64).problems
    assert list(problems) == [WEAK_MASK] * is_weak
    if white == 43:
        assert (
            "values up to 0.17 of 1, which fades the subject; save white as 255"
            in problems[WEAK_MASK][0]
        )


def test_subjects_outside_the_crop_are_counted_and_buckets_keep_them(tmp_path: Path):
    # of 120 x 60 the square crop keeps columns 30 to 89
    for stem, left in (("half", 20), ("less", 19)):
        write_pair(tmp_path, stem, size=(120, 60), box=(left, 10, left + 20, 40))
    write_pair(tmp_path, "upright", size=(60, 120), box=(10, 90, 40, 110))
    source = FolderSource(tmp_path)
    assert check_source(source, resolution=64).num_cropped == 2
    report = check_source(source, resolution=512, has_buckets=True)
    assert (report.num_cropped, report.num_enlarged, report.problems) == (0, 3, {})


def test_masks_of_another_image_are_not_counted_as_cropped(tmp_path: Path):
    write_pair(tmp_path, "0", size=(120, 60), box=(0, 10, 20, 40))
    row = {"image": "0_generation.png", "subject": "0_generation.png", "mask": "0_mask.png"}
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(row | {"caption": "x"}), encoding="utf-8")
    assert check_source(ManifestSource(path), resolution=64).num_cropped == 0
    assert check_source(FolderSource(tmp_path), resolution=64).num_cropped == 1


def test_targets_with_hidden_pixels_are_counted_and_cut_out_subjects_are_not(tmp_path: Path):
    write_pair(tmp_path, "0")
    with (
        Image.open(tmp_path / "0_generation.png") as opaque,
        Image.open(tmp_path / "0_mask.png") as mask,
    ):
        opaque.save(tmp_path / "plain.png")
        opaque.putalpha(mask)
        opaque.save(tmp_path / "0_generation.png")
    assert check_source(FolderSource(tmp_path), resolution=64).num_transparent == 1
    rows = [
        {"image": "plain.png", "subject": "0_generation.png", "caption": "x"},
        {"image": "0_generation.png", "subject": "plain.png", "caption": "x"},
        {"image": "0_generation.png", "caption": "x"},
    ]
    for row, count in zip(rows, (0, 1, 1), strict=True):
        path = tmp_path / "set.jsonl"
        path.write_text(json.dumps(row), encoding="utf-8")
        assert check_source(ManifestSource(path), resolution=64).num_transparent == count


def test_sheet_with_buckets_shows_what_the_square_crop_loses(tmp_path: Path):
    write_pair(tmp_path, "0", size=(120, 60), box=(2, 2, 22, 58))
    reds: list[bool] = []
    for has_buckets in (False, True):
        sheet = training_sheet(
            FolderSource(tmp_path), resolution=512, num_samples=1, has_buckets=has_buckets
        )
        assert sheet is not None
        reds.append(bool(((sheet[0, :256, :256, 0] > 0.7) & (sheet[0, :256, :256, 2] < 0.1)).any()))
    assert reds == [False, True]


def test_command_suggests_buckets_and_names_hidden_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_pair(tmp_path, "0", size=(120, 60), box=(0, 10, 20, 40))
    with Image.open(tmp_path / "0_generation.png") as image:
        image.putalpha(128)
        image.save(tmp_path / "0_generation.png")
    command = ["dataset", "check", str(tmp_path), "--resolution", "512", "--samples", "0"]
    for more, hint in (([], "or train with buckets"), (["--buckets"], "")):
        with pytest.raises(SystemExit):  # the alpha makes the mask weak
            main([*command, *more])
        printed = capsys.readouterr().out
        assert "1 are partly transparent" in printed
        assert ("1 lose more than half of their subject" in printed) == bool(hint)
        assert hint in printed


def test_tokens_are_counted_with_the_given_counter(flawed: Path):
    report = check_source(FolderSource(flawed), resolution=64, count_tokens=len)
    assert tuple(report.caption_tokens.values()) == (5, 12, 12, 0)


def test_sheet_shows_target_and_reference_and_passes_over_the_unreadable(flawed: Path):
    sheet = training_sheet(FolderSource(flawed), resolution=64, num_samples=100)
    assert sheet is not None
    assert sheet.shape == (1, 4 * 276, 2 * 256, 3)
    assert sheet[0, 2, 2].tolist() == pytest.approx([0, 0, 1], abs=0.01)  # the target's blue
    reference = sheet[0, :256, 256:]
    assert not bool(((reference[..., 2] > 0.9) & (reference[..., 0] < 0.1)).any())
    assert bool((reference == 1).all(-1).any())


def test_sheet_of_unreadable_pairs_alone_is_none(flawed: Path):
    for stem in ("dog/0", "dog/1", "flaws/full", "flaws/mute"):
        (flawed / f"{stem}_generation.png").write_bytes(b"nothing")
    assert training_sheet(FolderSource(flawed), resolution=64, num_samples=8) is None


def test_command_prints_the_report_writes_the_sheet_and_exits_1_on_flaws(
    flawed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "sheet.png"
    with pytest.raises(SystemExit) as ended:
        main(["dataset", "check", str(flawed), "--resolution", "64", "--out", str(out)])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 pairs, 4 of them readable"
    assert "         3  90 x 60" in lines
    assert "captions: 0 to 3 words, median 2" in lines
    assert f"{BAD_MASK} (1):" in lines
    assert lines[-1].endswith(str(out))
    sheet, _ = read_image(out)
    assert sheet.shape[2] == 512


def test_command_returns_0_on_a_good_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_pair(tmp_path / "set", "0")
    monkeypatch.chdir(tmp_path)
    assert main(["dataset", "check", "set", "--resolution", "64", "--samples", "0"]) == 0
    assert "no problems" in capsys.readouterr().out
    assert not Path("check.png").exists()
    assert main(["dataset", "check", "set", "--resolution", "64"]) == 0
    assert Path("check.png").exists()


def test_the_sheet_is_not_written_into_the_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_pair(tmp_path / "set", "0")
    monkeypatch.chdir(tmp_path / "set")
    target = Path("0_generation.png").read_bytes()
    for out in ("check.png", "0_generation.png", str(tmp_path / "set" / "new.png")):
        assert main(["dataset", "check", ".", "--resolution", "64", "--out", out]) == 2
        assert "Expected --out to be outside of the set" in capsys.readouterr().err
    assert Path("0_generation.png").read_bytes() == target
    assert not Path("check.png").exists()


def test_the_file_of_a_run_says_how_training_sees_its_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_pair(tmp_path / "set", "0")
    write_pair(tmp_path / "other", "0", size=(300, 200))
    monkeypatch.chdir(tmp_path)
    lines = ('model = "sd"', 'data = "set"', "resolution = 128", "keep_reference = true")
    Path("run.toml").write_text("\n".join(lines))
    assert main(["dataset", "check", "--config", "run.toml", "--out", "seen.png"]) == 0
    assert "1 have a side below 128" in capsys.readouterr().out
    given = ["set", "--resolution", "128", "--keep_reference"]
    assert main(["dataset", "check", *given, "--out", "given.png"]) == 0
    assert Path("seen.png").read_bytes() == Path("given.png").read_bytes()
    larger = ["--config", "run.toml", "--resolution", "320"]
    assert main(["dataset", "check", "other", *larger]) == 0
    assert "1 have a side below 320" in capsys.readouterr().out
    assert main(["dataset", "check", "other", "--config", "run.toml"]) == 0
    assert "300 x 200" in capsys.readouterr().out
    Path("run.toml").write_text('model = "sd"\nencoded = "set"')
    assert main(["dataset", "check", "--config", "run.toml"]) == 2
    assert "names no data" in capsys.readouterr().err
    assert main(["dataset", "check"]) == 2
    assert "given neither" in capsys.readouterr().err


def test_command_lists_ten_of_a_kind_and_ten_sizes_and_counts_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for index in range(13):
        write_pair(tmp_path, f"{index:02d}", size=(80 + index, 60), caption="")
    with pytest.raises(SystemExit):
        main(["dataset", "check", str(tmp_path), "--samples", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("the caption is empty" in line for line in lines) == 10
    assert "  and 3 more" in lines
    assert "         3  of 3 further sizes" in lines
    assert "13 have a side below 512 and may be enlarged" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "training set"),
        (["set", "--resolution", "100"], "--resolution must be a multiple of 8"),
        (["set", "--size", "512"], "It is called 'resolution' here"),
        (["set", "--samples", "-1"], "--samples must be at least 0"),
        (["set", "--out", "missing/check.png"], "There is no folder"),
        (["set", "--out", "set"], "ending in .png; given set"),
        (["set", "--out", "x.jpg"], "ending in .png; given x.jpg"),
        (["set", "--out", "folder.png"], "ending in .png; given folder.png"),
        (["set", "--tokenizer", "missing"], "folder of a tokenizer"),
    ],
)
def test_command_returns_2_on_bad_input(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
):
    if "--tokenizer" in arguments:
        pytest.importorskip("transformers")
    write_pair(tmp_path / "set", "0")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["dataset", "check", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_reading_leaves_the_global_random_state_alone(flawed: Path):
    before = torch.get_rng_state()
    check_source(FolderSource(flawed), resolution=64)
    training_sheet(FolderSource(flawed), resolution=64, num_samples=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_names_cannot_forge_lines_of_the_report_or_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_pair(tmp_path / "set", "a\nno problems\x1b[2J", box=(0, 0, 90, 60))
    write_pair(tmp_path / "set", "b\nno problems", box=(0, 0, 0, 0))
    write_pair(tmp_path / "set", "c\nerror: x")
    (tmp_path / "set" / "c\nerror: x_mask.png").unlink()
    with pytest.raises(SystemExit):
        main(["dataset", "check", str(tmp_path / "set"), "--samples", "0", "--resolution", "64"])
    printed = capsys.readouterr()
    lines = [*printed.out.split("\n"), *printed.err.replace("\r", "\n").split("\n")]
    assert all(line.isprintable() for line in lines)
    assert "no problems" not in lines
    assert r"a\nno problems\x1b[2J" in printed.out


def test_pairs_are_shown_one_by_one_and_not_submitted_all_at_once(monkeypatch: pytest.MonkeyPatch):
    """Of 400,000 pairs the first result took 22 s and 700 MiB."""
    submitted: list[int] = []
    submit = ThreadPoolExecutor.submit

    def count(pool: ThreadPoolExecutor, function: Any, index: int) -> Any:
        submitted.append(index)
        return submit(pool, function, index)

    shown: list[int] = []

    class Bar:
        def __init__(self, found: Any, **_: Any) -> None:
            self.found = found

        def __iter__(self) -> Any:
            for result in self.found:
                shown.append(len(submitted))
                yield result

    monkeypatch.setattr(ThreadPoolExecutor, "submit", count)
    monkeypatch.setattr(checking, "tqdm", Bar)
    report = check_source(NothingReadable(5000), resolution=64)
    assert report.num_pairs == len(submitted) == 5000
    assert shown[0] <= checking.NUM_WAITING
    assert submitted == list(range(5000))
    assert [text.split(" ")[0] for text in report.problems[UNREADABLE]] == [
        str(i) for i in range(5000)
    ]


class NothingReadable:
    """So many pairs, none of which can be read."""

    problems = ()

    def __init__(self, count: int) -> None:
        self.keys, self.distinct = [str(i) for i in range(count)], range(count)

    def files(self, index: int) -> tuple[str, ...]:
        return (f"{index}.png",)

    def read(self, index: int) -> Any:
        raise FileFormatError(f"no {index}")

    size = caption = stamp = read
