"""What training data looks like to everything that reads it: pairs of a target and a picture of its subject."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pair:
    """One training example as it lies on disk, before augmentation.

    Attributes:
        target: The picture to be generated, (1, height, width, 3), float32 in [0, 1].
        subject: A picture of its subject, same form, any size; often the target itself.
        mask: Where the subject is in ``subject``, (1, height, width) in [0, 1], 1 = subject; ``None``: everywhere.
        caption: Text of the target.
    """

    target: Tensor
    subject: Tensor
    mask: Tensor | None
    caption: str


class PairSource(Protocol):
    """A set of pairs with random access; must be picklable, as data loaders hand it to their workers."""

    @property
    def keys(self) -> Sequence[str]:
        """Unique name of every pair, in a fixed order that does not depend on the file system."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """What was left out of the set, and why, one sentence each."""
        ...

    def files(self, index: int) -> tuple[str, ...]:
        """Files (or members of shards) that a pair is read from, for messages."""
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
    """Identify a set by the names of its pairs: a run resumes only on the set that it began with.

    Args:
        source: The set.

    Returns:
        SHA-256 as hexadecimal text.
    """
    digest = hashlib.sha256()
    for key in source.keys:
        digest.update(f"{len(key)}:{key}".encode())
    return digest.hexdigest()
