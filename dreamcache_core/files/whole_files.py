"""Files that appear whole or not at all, also where the machine stops."""

import hashlib
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
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk; Windows does that for folders by itself."""
    if os.name == "nt" and path.is_dir():
        return
    with suppress(PermissionError):  # of a folder that may be written to, but not read
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def digest_of(path: Path) -> str:
    """SHA-256 of a file's contents, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
