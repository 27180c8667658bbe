"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, by: str = "") -> Iterator[Path]:
    """Let a file take its place only once it is complete; after an exception the old one is left.

    Args:
        path: The file, in an existing folder; an older one is replaced.
        by: Who writes, where several may write the same file; part of a file name.

    Yields:
        The hidden path beside it to write to; nothing is left there afterwards, unless the process is killed.

    Raises:
        OSError: The path is a folder, or its folder does not exist or cannot be written to.
    """
    temporary = path.with_name(f".{by or path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
