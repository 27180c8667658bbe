"""Which samples a run was begun on, so that what has changed in the set can be named."""

from __future__ import annotations

from pathlib import Path

from ..data.sources.reading import without_times
from ..data.sources.source import PairSource
from ..files.jsonl import append_lines, read_lines
from ..files.whole_files import whole_file

RECORD_FILE = "training_set.jsonl"

NUM_NAMED = 3
"""Samples of a kind that ``set_changes`` names; the rest is counted."""


def write_record(folder: Path, source: PairSource) -> None:
    """Write down the samples of a run, in its folder.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    entries = (
        {"key": source.keys[index], "stamp": source.stamp(index)} for index in source.distinct
    )
    with whole_file(folder / RECORD_FILE) as temporary:
        append_lines(temporary, entries)


def set_changes(folder: Path, source: PairSource) -> str:
    """Say how a set differs from the one that a run was begun on; times of files, which a plain copy changes, aside.

    Args:
        folder: Folder of the run.
        source: The set as it is now.

    Returns:
        The changes, with the names of some samples; empty: there are none.
    """
    before = {
        entry["key"]: without_times(entry["stamp"])
        for entry in read_lines(folder / RECORD_FILE)
        if isinstance(entry.get("key"), str) and isinstance(entry.get("stamp"), str)
    }
    if not before:
        return f"{RECORD_FILE}, which would tell the samples, is not there"
    now = {source.keys[index]: without_times(source.stamp(index)) for index in source.distinct}
    kinds = {
        "changed": [key for key in now if key in before and now[key] != before[key]],
        "new": [key for key in now if key not in before],
        "gone": [key for key in before if key not in now],
    }
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:NUM_NAMED])}{', ...' if len(keys) > NUM_NAMED else ''})"
        for kind, keys in kinds.items()
        if keys
    )
