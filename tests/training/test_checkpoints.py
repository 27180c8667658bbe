"""Checkpoints appear whole or not at all, and a run resumes only as itself."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dreamcache_core import InputError, StateError
from dreamcache_core.files.jsonl import append_lines
from dreamcache_core.training.checkpoints import Checkpoints, cut_log

IDENTITY = {"base model": "abc", "seed": 0}
ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def save(checkpoints: Checkpoints, step: int, text: str = "weights") -> None:
    with checkpoints.new(step, ALONE) as target:
        (target / "file").write_text(text)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    made = Checkpoints(tmp_path / "run", keep=2)
    made.write_identity(IDENTITY, {})
    return made


def test_newest_checkpoints_are_kept(checkpoints: Checkpoints) -> None:
    for step in (5, 10, 1_000_000):
        save(checkpoints, step)
    assert [step for step, _ in checkpoints.complete()] == [10, 1_000_000]
    assert checkpoints.newest() == (1_000_000, checkpoints.folder / "step-1000000")


def test_a_checkpoint_cut_off_while_written_does_not_count_and_goes(
    checkpoints: Checkpoints,
) -> None:
    save(checkpoints, 5)
    unfinished = checkpoints.new(10, ALONE).__enter__()
    (unfinished / "file").write_text("half")
    assert [step for step, _ in checkpoints.complete()] == [5]
    save(checkpoints, 15)
    names = [path.name for path in (checkpoints.folder).iterdir()]
    assert sorted(names) == ["step-000005", "step-000015"]


def test_full_disk_leaves_the_last_checkpoint_and_names_it(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5, "good")
    with (
        pytest.raises(InputError, match=r"step 10 .*No space left.*step-000005.*--resume"),
        checkpoints.new(10, ALONE),
    ):
        raise OSError(28, "No space left on device")
    assert (checkpoints.folder / "step-000005" / "file").read_text() == "good"


def test_a_run_in_the_folder_is_not_overwritten(checkpoints: Checkpoints) -> None:
    checkpoints.require_free()
    save(checkpoints, 5)
    with pytest.raises(StateError, match="--resume"):
        checkpoints.require_free()
    assert checkpoints.choose_start(IDENTITY) == checkpoints.newest()


def test_another_run_is_not_resumed_and_all_differences_are_named(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    other = {"base model": "xyz", "seed": 1}
    with pytest.raises(InputError, match=r"base model was 'abc', is 'xyz'; seed was 0, is 1"):
        checkpoints.choose_start(other)


def test_resuming_without_a_checkpoint_begins_anew_and_says_so(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoints.choose_start(IDENTITY) is None
    assert "begins at step 0" in caplog.text


def test_damaged_state_is_explained(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    (checkpoints.run_folder / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is missing or damaged"):
        checkpoints.choose_start(IDENTITY)


def test_log_is_cut_back_to_the_step_that_is_resumed(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    append_lines(log, [{"step": step, "loss": 1.0} for step in (10, 20, 30)])
    with log.open("a") as stream:
        stream.write('{"step": 1')  # the disk was full
    cut_log(log, 20)
    lines = log.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


@pytest.mark.parametrize("change", ["bytes", "cut", "gone", "contents", "elsewhere", "NUL", "pipe"])
def test_a_damaged_newest_checkpoint_is_named_with_the_good_one_before_it(
    checkpoints: Checkpoints, change: str
) -> None:
    save(checkpoints, 5)
    save(checkpoints, 10)
    newest = checkpoints.folder / "step-000010"
    contents = {"contents": "[1]", "elsewhere": '{"/dev/zero": ""}', "NUL": '{"a\\u0000b": ""}'}
    changed = {"bytes": b"weighty", "cut": b"weig"}.get(change)
    if change in contents:
        (newest / "contents.json").write_text(contents[change])
    elif change == "pipe":
        (newest / "file").unlink()
        os.mkfifo(newest / "file")
    elif changed is None:
        (newest / "file").unlink()
    else:
        (newest / "file").write_bytes(changed)
    match = r"step-000010 is damaged: .*Remove that folder.*goes on from .*step-000005"
    with pytest.raises(InputError, match=match):
        checkpoints.choose_start(IDENTITY)
    shutil.rmtree(newest)
    (checkpoints.folder / "step-000005" / "file").write_text("other")
    with pytest.raises(InputError, match=r"step-000005 is damaged: .*begins at step 0"):
        checkpoints.choose_start(IDENTITY)


def test_a_checkpoint_from_before_there_were_digests_is_taken(checkpoints: Checkpoints) -> None:
    save(checkpoints, 5)
    (checkpoints.folder / "step-000005" / "contents.json").unlink()
    assert checkpoints.choose_start(IDENTITY) == checkpoints.newest()


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"identity": [1]}', "[" * 100_000, ""])
def test_run_json_that_is_no_object_is_explained(checkpoints: Checkpoints, text: str) -> None:
    save(checkpoints, 5)
    (checkpoints.run_folder / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json is missing or damaged"):
        checkpoints.choose_start(IDENTITY)


def test_log_with_entries_that_are_no_objects_or_have_no_step_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    odd = ("[1]", "null", '{"step": "x"}', '{"step": null}', "[" * 100_000, "\udcff")
    log.write_text("\n".join(('{"step": 10}', *odd, '{"step": 30}')), errors="surrogateescape")
    cut_log(log, 20)
    assert log.read_text() == '{"step": 10}\n'
