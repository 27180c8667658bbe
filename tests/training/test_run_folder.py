"""Checkpoints appear whole or not at all, and a run resumes only as itself."""

import json
from pathlib import Path

import pytest

from dreamcache_core import InputError, StateError
from dreamcache_core.training.run_folder import RunFolder

IDENTITY = {"base model": "abc", "seed": 0}


def save(folder: RunFolder, step: int, text: str = "weights") -> None:
    with folder.new_checkpoint(step, is_main=True, wait=lambda: None) as target:
        (target / "file").write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run", keep_checkpoints=2)
    made.write_state(IDENTITY, {})
    return made


def test_newest_checkpoints_are_kept(folder: RunFolder) -> None:
    for step in (5, 10, 1_000_000):
        save(folder, step)
    assert [step for step, _ in folder.checkpoints()] == [10, 1_000_000]
    assert folder.newest_checkpoint() == (1_000_000, folder.path / "checkpoints" / "step-1000000")


def test_a_checkpoint_cut_off_while_written_does_not_count_and_goes(folder: RunFolder) -> None:
    save(folder, 5)
    unfinished = folder.new_checkpoint(10, is_main=True, wait=lambda: None).__enter__()
    (unfinished / "file").write_text("half")
    assert [step for step, _ in folder.checkpoints()] == [5]
    save(folder, 15)
    names = [path.name for path in (folder.path / "checkpoints").iterdir()]
    assert sorted(names) == ["step-000005", "step-000015"]


def test_full_disk_leaves_the_last_checkpoint_and_names_it(folder: RunFolder) -> None:
    save(folder, 5, "good")
    with (
        pytest.raises(InputError, match=r"step 10 .*No space left.*step-000005.*--resume"),
        folder.new_checkpoint(10, is_main=True, wait=lambda: None),
    ):
        raise OSError(28, "No space left on device")
    assert (folder.path / "checkpoints" / "step-000005" / "file").read_text() == "good"


def test_a_run_in_the_folder_is_not_overwritten(folder: RunFolder) -> None:
    assert folder.begin(IDENTITY, resume=False) is None
    save(folder, 5)
    with pytest.raises(StateError, match="--resume"):
        folder.begin(IDENTITY, resume=False)
    assert folder.begin(IDENTITY, resume=True) == folder.newest_checkpoint()


def test_another_run_is_not_resumed_and_all_differences_are_named(folder: RunFolder) -> None:
    save(folder, 5)
    other = {"base model": "xyz", "seed": 1}
    with pytest.raises(InputError, match=r"base model was 'abc', is 'xyz'; seed was 0, is 1"):
        folder.begin(other, resume=True)


def test_resuming_without_a_checkpoint_begins_anew_and_says_so(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    assert folder.begin(IDENTITY, resume=True) is None
    assert "begins at step 0" in caplog.text


def test_damaged_state_is_explained(folder: RunFolder) -> None:
    save(folder, 5)
    (folder.path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is missing or damaged"):
        folder.begin(IDENTITY, resume=True)


def test_log_is_cut_back_to_the_step_that_is_resumed(folder: RunFolder) -> None:
    for step in (10, 20, 30):
        folder.log({"step": step, "loss": 1.0})
    with folder.log_file.open("a") as stream:
        stream.write('{"step": 1')  # the disk was full
    folder.cut_log(20)
    lines = folder.log_file.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]
