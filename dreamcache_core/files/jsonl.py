"""Logs of one JSON object a line, which a process may be killed while writing."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .texts import parse_json


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a log; a line that was cut short, or is no object, is left out.

    Args:
        path: The log; where there is none, there are no lines.

    Yields:
        The objects, in order.
    """
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def append_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add objects to a log, below a line that was cut short; they are on the disk when this returns.

    Args:
        path: The log, in an existing folder; created where there is none.
        entries: What to add; all that JSON can hold.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    text = "".join(f"{json.dumps(entry)}\n" for entry in entries)
    with path.open("ab+") as stream:
        is_torn = False
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            is_torn = stream.read() != b"\n"
        stream.write(("\n" + text if is_torn else text).encode())
