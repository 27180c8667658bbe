"""Captions for a synthetic set: from a file, or every subject in every context of two lists."""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import FileFormatError, InputError
from ...files.texts import read_text

LISTS = Path(__file__).parent / "lists"
SUBJECTS_FILE = LISTS / "subjects.txt"
CONTEXTS_FILE = LISTS / "contexts.txt"

MAX_SLUG_LENGTH = 50


@dataclass(frozen=True)
class Caption:
    """What an image shows.

    Attributes:
        subject: What the segmenter looks for, such as ``a red toy car``.
        text: What the image is generated from, and trained with.
    """

    subject: str
    text: str

    @property
    def slug(self) -> str:
        """The subject as the name of a folder: letters, digits and hyphens, at most 50."""
        words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", self.subject).lower())
        return words[:MAX_SLUG_LENGTH].strip("-") or "subject"


def read_captions(path: str | Path) -> list[Caption]:
    """Read a caption from every line that is not blank.

    Args:
        path: UTF-8 text. A line is ``caption`` or ``subject<TAB>caption``; without a subject, it is what stands
            before the first comma, or else the whole caption.

    Returns:
        The captions, at least one, in the order of the file.

    Raises:
        InputError: The file is missing, empty or no UTF-8 text, or a line has an empty part or several tabs.
    """
    return [_parse(line, number, path) for number, line in _numbered_lines(path)]


def combine_lists(
    subjects: str | Path = SUBJECTS_FILE, contexts: str | Path = CONTEXTS_FILE, *, seed: int = 0
) -> list[Caption]:
    """Put every subject into every context, each on a line of its file, in an order drawn from the seed.

    Source: DreamCache, captions of the form "<subject>, <context>". Differs from it in: both come from lists, not
    from a language model.

    Raises:
        InputError: A file is missing, empty or no UTF-8 text.
    """
    places = [line.strip() for _, line in _numbered_lines(contexts)]
    pairs = [
        Caption(line.strip(), f"{line.strip()}, {place}")
        for _, line in _numbered_lines(subjects)
        for place in places
    ]
    random.Random(seed).shuffle(pairs)
    return pairs


def captions_digest(captions: Sequence[Caption]) -> str:
    """Identify captions and their order: SHA-256 as hexadecimal text."""
    lines = "\n".join(f"{caption.subject}\t{caption.text}" for caption in captions)
    return hashlib.sha256(lines.encode()).hexdigest()


def _numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    """Return the lines that are not blank, stripped but for tabs, with their numbers from 1."""
    try:
        text = read_text(path)
    except FileFormatError as error:
        raise InputError(
            f"Expected a UTF-8 text file with one entry per line; {path} cannot be read as one: {error}. Check the "
            "path, or save the file as UTF-8."
        ) from error
    # not splitlines: it also breaks at characters that may stand within a caption
    numbered = enumerate(text.split("\n"), start=1)
    lines = [(number, line.strip(" \r")) for number, line in numbered if line.strip()]
    if not lines:
        raise InputError(f"Expected at least one line of text in {path}; it is empty. Add some.")
    return lines


def _parse(line: str, number: int, path: str | Path) -> Caption:
    parts = [part.strip() for part in line.split("\t")]
    if len(parts) == 1:
        return Caption(line.split(",")[0].strip() or line, line)
    if len(parts) != 2 or not all(parts):
        raise InputError(
            f"Expected 'caption' or 'subject<TAB>caption' in line {number} of {path}, got {line!r}. Use one tab, with "
            "text on both sides."
        )
    return Caption(*parts)
