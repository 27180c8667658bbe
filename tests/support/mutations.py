"""Seeded mutations of files, and what must hold of a reader whatever they are."""

import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dreamcache_core.errors import DreamCacheError

try:
    import resource
except ImportError:  # Windows
    resource = None

MAX_S, MAX_MIB = 5.0, 512
TOKENS = (
    *(b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"\\ud800", b"NaN", b"--resume", b"[" * 3000),
    *(b"\0", b"\xff\xfe", b"\x1b[2J", b"\r\n", b'"', b",", b"=", b"9" * 400, b"\x80" * 8),
)


def mutations(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield a file's contents with bytes flipped, cut, doubled, or replaced by what parsers stumble over."""
    draw = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(len(changed) + 1)
            end = min(len(changed), at + draw.choice((1, 4, 20, 200)))
            token = draw.choice(TOKENS)
            change = draw.choice((b"", token, bytes(changed[at:end]) * 2, draw.randbytes(end - at)))
            changed[at : at if change is token and draw.random() < 0.5 else end] = change
        yield bytes(changed[: draw.randrange(len(changed) + 1)] if draw.random() < 0.1 else changed)


def require_equal_or_refused(
    path: Path, content: bytes, read: Callable[[Path], Any], check: Callable[[Any], bool]
) -> None:
    """Read a mutated file: ``check`` holds of what is read, or one line says why it is not; in time, in memory."""
    path.write_bytes(content)
    before, start, said = _peak_mib(), time.process_time(), ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            is_right = check(read(path))
        except (DreamCacheError, OSError) as error:
            is_right, said = True, str(error)
    assert is_right
    assert said.isprintable(), ascii(said)
    assert time.process_time() - start < MAX_S
    assert _peak_mib() - before < MAX_MIB + len(content) / 2**20
    assert list(path.parent.iterdir()) == [path]


def _peak_mib() -> float:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
