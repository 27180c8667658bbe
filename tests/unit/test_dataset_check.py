"""``dreamcache dataset check``: what it counts, what it complains of, and how it ends."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreamcache_core.cli import main
from dreamcache_core.data.checking import (
    BAD_MASK,
    FULL_MASK,
    INCOMPLETE,
    NO_CAPTION,
    UNREADABLE,
    check_source,
    training_sheet,
)
from dreamcache_core.data.folder import FolderSource
from dreamcache_core.data.manifest import ManifestSource
from dreamcache_core.image_files import read_image


def write_pair(
    folder: Path,
    stem: str,
    *,
    size: tuple[int, int] = (90, 60),
    box: tuple[int, int, int, int] = (20, 10, 50, 40),
    caption: str = "a red square",
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture, mask = Image.new("RGB", size, (0, 0, 255)), Image.new("L", size, 0)
    picture.paste((200, 0, 0), box)
    mask.paste(255, box)
    picture.save(folder / f"{stem}_generation.png")
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
        INCOMPLETE: 1,
        UNREADABLE: 1,
        BAD_MASK: 1,
        FULL_MASK: 1,
        NO_CAPTION: 1,
    }
    for kind, name in (
        (INCOMPLETE, "single_generation.png"),
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


def test_tokens_are_counted_with_the_given_counter(flawed: Path):
    report = check_source(FolderSource(flawed), resolution=64, count_tokens=len)
    assert report.caption_tokens == (5, 12, 12, 0)


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
        main(["dataset", "check", str(flawed), "--size", "64", "--out", str(out)])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 pairs, 4 of them readable"
    assert "         3  90 x 60" in lines
    assert "captions: 0 to 3 words, median 2" in lines
    assert f"1 {BAD_MASK}:" in lines
    assert lines[-1].endswith(str(out))
    sheet, _ = read_image(out)
    assert sheet.shape[2] == 512


def test_command_returns_0_on_a_good_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_pair(tmp_path / "set", "0")
    monkeypatch.chdir(tmp_path)
    assert main(["dataset", "check", "set", "--size", "64", "--samples", "0"]) == 0
    assert "no problems" in capsys.readouterr().out
    assert not Path("check.png").exists()
    assert main(["dataset", "check", "set", "--size", "64"]) == 0
    assert Path("check.png").exists()


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
        (["set", "--size", "100"], "--size must be a multiple of 8"),
        (["set", "--samples", "-1"], "--samples must be at least 0"),
        (["set", "--out", "missing/check.png"], "There is no folder"),
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
    monkeypatch.chdir(tmp_path)
    assert main(["dataset", "check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_reading_leaves_the_global_random_state_alone(flawed: Path):
    before = torch.get_rng_state()
    check_source(FolderSource(flawed), resolution=64)
    training_sheet(FolderSource(flawed), resolution=64, num_samples=2)
    assert torch.equal(torch.get_rng_state(), before)
