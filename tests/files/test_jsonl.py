"""Logs of one object a line survive being cut short."""

from pathlib import Path

import pytest

from dreamcache_core.files.jsonl import append_lines, read_lines


def test_what_was_appended_is_read_in_order(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    append_lines(log, [{"a": 1}, {"a": 2}])
    append_lines(log, [{"a": 3}])
    assert [entry["a"] for entry in read_lines(log)] == [1, 2, 3]


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path):
    assert list(read_lines(tmp_path / "log.jsonl")) == []


@pytest.mark.parametrize("torn", [b'{"a": 2', b'{"a": "\xc3', b"nonsense", b"[1]\n", b"\xff\xfe"])
def test_a_torn_line_is_left_out_and_the_next_one_stands_below_it(tmp_path: Path, torn: bytes):
    log = tmp_path / "log.jsonl"
    append_lines(log, [{"a": 1}])
    log.write_bytes(log.read_bytes() + torn)
    append_lines(log, [{"a": 3}])
    assert [entry["a"] for entry in read_lines(log)] == [1, 3]
