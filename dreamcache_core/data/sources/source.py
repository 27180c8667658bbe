"""What training data looks like to everything that reads it: pairs of a target and an image of its subject."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pair:
    """One training example as it lies on disk, before augmentation.

    Attributes:
        target: The image to be generated, (1, height, width, 3), float32 in [0, 1].
        subject: An image of its subject, same form, any size; often the target itself.
        mask: Where the subject is in ``subject``, (1, height, width) in [0, 1], 1 = subject; ``None``: everywhere.
        caption: Text of the target.
        has_hidden_pixels: Whether the target has pixels that its own alpha channel hides; training sees them.
        has_own_subject: Whether the subject is shown by another image than the target's.
        is_turned: Whether the mask marked the background and was turned round.
    """

    target: Tensor
    subject: Tensor
    mask: Tensor | None
    caption: str
    has_hidden_pixels: bool = False
    has_own_subject: bool = False
    is_turned: bool = False


class PairSource(Protocol):
    """A set of pairs with random access; must be picklable, as data loaders hand it to their workers."""

    @property
    def keys(self) -> Sequence[str]:
        """Unique name of every pair, in a fixed order that does not depend on the file system."""
        ...

    @property
    def distinct(self) -> Sequence[int]:
        """Index of every pair once, also of one that a set repeats."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """What was left out of the set, and why, one sentence each."""
        ...

    def files(self, index: int) -> tuple[str, ...]:
        """Files (or members of shards) that a pair is read from, for messages."""
        ...

    def stamp(self, index: int) -> str:
        """Text that changes when the contents of a pair do, without reading them: sizes and times of its files."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the target in pixels, as seen (EXIF applied), read from its header alone."""
        ...

    def caption(self, index: int) -> str:
        """Caption of a pair."""
        ...

    def read(self, index: int) -> Pair:
        """Read a pair.

        Raises:
            DreamCacheError: A file is missing, damaged or unfit; the message names it.
        """
        ...


def fingerprint(source: PairSource) -> str:
    """Identify a set by the names of its pairs and the sizes and times of their files: SHA-256 as hexadecimal text.

    A run resumes only on the set that it began with, and a precomputed set serves it alone. A copy is the same set
    where it keeps the times (``cp -p``, ``rsync -a``, ``tar``).
    """
    digest = hashlib.sha256()
    for index, key in enumerate(source.keys):
        stamp = source.stamp(index)
        digest.update(f"{len(key)}:{key}:{len(stamp)}:{stamp}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def spread(source: PairSource, count: int) -> list[int]:
    """Choose so many different pairs, at most, from the whole length of a set."""
    distinct = source.distinct
    count = min(count, len(distinct))
    return [distinct[place * len(distinct) // count] for place in range(count)]
