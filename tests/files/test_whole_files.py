"""Files that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from dreamcache_core.files.whole_files import whole_file


def test_file_replaces_the_old_one_at_the_end_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert temporary.name.startswith(".")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_exception_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_the_same_file_do_not_meet(tmp_path: Path):
    path = tmp_path / "a.txt"
    with whole_file(path, by="one") as one, whole_file(path, by="two") as two:
        one.write_text("1")
        two.write_text("2")
        assert one != two
    assert path.read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="folders are flushed by Windows itself")
def test_file_is_on_the_disk_before_it_appears_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, done = tmp_path / "a.txt", list[str]()
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("appears") or replace(*paths))
    with whole_file(path) as temporary:
        temporary.write_text("1")
    assert done == ["file", "appears", "folder"]


def test_missing_folder_and_folder_in_place_of_the_file_are_errors(tmp_path: Path):
    for path in (tmp_path / "missing" / "a.txt", tmp_path):
        with pytest.raises(OSError, match="director"), whole_file(path) as temporary:
            temporary.write_text("x")
