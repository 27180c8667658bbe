"""Text and JSON files: read whole, of a size that is known before, and refused in words."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FileFormatError

MAX_CAPTION_BYTES = 2**16
MAX_STATE_BYTES = 2**28
"""Most bytes of a file in which we keep what we know."""


def read_text(path: str | os.PathLike[str], most_bytes: int | None = None) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Args:
        path: The file.
        most_bytes: Largest size; ``None``: any.

    Raises:
        FileFormatError: It is missing, too large, no UTF-8, or no file but a pipe, say.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():  # a pipe would not end
            raise FileFormatError(f"Expected a file, got {path}, which is none. Give its copy.")
        if most_bytes is not None and file.stat().st_size > most_bytes:
            raise FileFormatError(
                f"Expected at most {most_bytes} bytes of text in {path}, got {file.stat().st_size}. Is it another file?"
            )
        data = file.read_bytes()
    except OSError as error:
        raise FileFormatError(
            f"Expected a readable file, got {path}: {error.strerror}. Check its place and permissions."
        ) from error
    return decode_text(data, str(path))


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8 text, with or without a byte order mark.

    Raises:
        FileFormatError: It is not UTF-8; the message calls it ``name``.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"Expected text in UTF-8, got {name}: {error}. Save it again as UTF-8 text."
        ) from error


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is none, nested too deeply, or an object names a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_of)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object_of(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, count),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{key!r} is given {count} times")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that this project, or the maker of a model, has written.

    Raises:
        FileFormatError: The file is missing, damaged, or holds something else than an object.
    """
    try:
        values = parse_json(read_text(path, MAX_STATE_BYTES))
    except FileFormatError:
        raise
    except ValueError as error:
        raise FileFormatError(f"Expected JSON in {path}: {error}. The file is damaged.") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"Expected a JSON object in {path}. The file is damaged.")
    return values
