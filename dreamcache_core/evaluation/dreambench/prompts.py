"""The lists of DreamBench: its subjects with their class words, and the prompts for objects and for live subjects.

Source: Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", CVPR
2023, the lists published with its dataset. Differs from it in: a prompt has no unique token, as no subject is trained.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import nearest
from ...data.synthetic.captions import _numbered_lines
from ...errors import InputError
from ...names import is_plain_name, printable

LISTS = Path(__file__).parent / "lists"
SUBJECTS_FILE = LISTS / "dreambench_subjects.csv"
OBJECT_PROMPTS_FILE = LISTS / "dreambench_object_prompts.txt"
LIVE_PROMPTS_FILE = LISTS / "dreambench_live_prompts.txt"
DATASET_FILE = "prompts_and_classes.txt"
"""File in a dataset's folder that takes the place of the lists."""

COLUMNS = ("subject", "class", "kind", "reference")
"""Columns of a list of subjects; the last may be missing."""

LIVE_CLASSES = ("cat", "dog")
"""Class words of live subjects in the dataset's own file, which does not say so itself."""

PLACE = "{}"
"""Where the class word stands in a prompt."""

_CLASS_LINE = re.compile(r"^([\w-]+),([^,\n]+)$", re.MULTILINE)
_PROMPT_LINE = re.compile(r"""^\s*(['"])(.+)\1\.format\(""", re.MULTILINE)
_LIVE_HEADING = "Live Subject Prompts"


@dataclass(frozen=True)
class SubjectEntry:
    """A line of the list of subjects.

    Attributes:
        name: Name of the subject's folder.
        class_word: What it is, in a word or two: ``stuffed animal``.
        is_live: Which list of prompts it gets.
        reference: Name of its reference image; empty: the first of its images.
    """

    name: str
    class_word: str
    is_live: bool
    reference: str = ""


@dataclass(frozen=True)
class Benchmark:
    """The lists.

    Attributes:
        subjects: In their order, which numbers them.
        object_prompts: With ``{}`` where the class word stands.
        live_prompts: Likewise.
    """

    subjects: Sequence[SubjectEntry]
    object_prompts: Sequence[str]
    live_prompts: Sequence[str]

    def prompts_of(self, subject: SubjectEntry) -> tuple[str, ...]:
        """Return a subject's prompts, its class word put in."""
        templates = self.live_prompts if subject.is_live else self.object_prompts
        return tuple(template.replace(PLACE, subject.class_word) for template in templates)


def read_benchmark(
    dataset: str | Path | None = None,
    *,
    subjects: str | Path | None = None,
    object_prompts: str | Path | None = None,
    live_prompts: str | Path | None = None,
) -> Benchmark:
    """Read the lists: from the files given, else from the dataset's own file, else those that ship.

    Args:
        dataset: Folder of the dataset.
        subjects: CSV with a heading: ``subject``, ``class``, ``kind`` (``object`` or ``live``) and, if wanted,
            ``reference`` (name of an image).
        object_prompts: UTF-8 text, a prompt with ``{}`` per line.
        live_prompts: Likewise.

    Returns:
        The lists.

    Raises:
        InputError: A file is missing or not of this form.
    """
    own = None if dataset is None else Path(dataset) / DATASET_FILE
    found = _read_dataset_file(own) if own is not None and own.is_file() else _shipped()
    return Benchmark(
        found.subjects if subjects is None else _read_subjects(Path(subjects)),
        found.object_prompts if object_prompts is None else _read_prompts(Path(object_prompts)),
        found.live_prompts if live_prompts is None else _read_prompts(Path(live_prompts)),
    )


def _shipped() -> Benchmark:
    return Benchmark(
        _read_subjects(SUBJECTS_FILE),
        _read_prompts(OBJECT_PROMPTS_FILE),
        _read_prompts(LIVE_PROMPTS_FILE),
    )


def _read_prompts(path: Path) -> tuple[str, ...]:
    lines = _numbered_lines(path)
    for number, line in lines:
        if line.count(PLACE) != 1:
            raise InputError(
                f"Expected one {PLACE} in every prompt, where the class word stands; line {number} of {path} is "
                f"{line!r}. Write 'a {PLACE} on the beach', say."
            )
    return tuple(line for _, line in lines)


def _read_subjects(path: Path) -> tuple[SubjectEntry, ...]:
    entries: list[SubjectEntry] = []
    try:
        for number, row in _rows(path):
            name, word, kind, reference = (row.get(column) or "" for column in COLUMNS)
            if not name or not word or kind not in ("object", "live"):
                raise InputError(
                    f"Expected the columns subject, class and kind (object or live) in line {number} of {path}; got {row}. "
                    "Head it with subject,class,kind and write a line such as 'backpack,backpack,object' for each."
                )
            entries.append(SubjectEntry(name, word, kind == "live", reference))
    except csv.Error as error:
        raise InputError(f"Expected CSV in {path}: {error}. Mind the quotes.") from error
    return _checked(entries, path)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each line, the last where quotes hold several, and its cells by column."""
    lines = _numbered_lines(path)
    reader = csv.DictReader((f"{line}\n" for _, line in lines), restkey="")
    columns = list(reader.fieldnames or ())
    for column in columns:
        if column not in COLUMNS:
            raise InputError(
                f"Expected the columns {', '.join(COLUMNS)} in {path}, got {column!r}. "
                f"{nearest(column, COLUMNS, 'Those that are read')}"
            )
    if len(set(columns)) < len(columns):
        raise InputError(
            f"Expected every column once in {path}, got {', '.join(columns)}. Remove what is double."
        )
    for row in reader:
        number, _ = lines[reader.line_num - 1]
        if any(more := row.pop("", [])):
            raise InputError(
                f"Expected {len(columns)} cells in line {number} of {path}, got {', '.join(more)} as well. Put a text with "
                "commas into quotes."
            )
        yield number, row


def _read_dataset_file(path: Path) -> Benchmark:
    """Read the classes and both lists out of the dataset's own text."""
    text = "\n".join(line for _, line in _numbered_lines(path))
    objects, _, live = text.partition(_LIVE_HEADING)
    entries = [
        SubjectEntry(name, word, word in LIVE_CLASSES)
        for name, word in _CLASS_LINE.findall(objects)
        if (name, word) != ("subject_name", "class")
    ]
    lists = [_templates(part) for part in (objects, live)]
    if not entries or not all(lists):
        raise InputError(
            f"Expected classes, 'Object Prompts' and '{_LIVE_HEADING}' in {path}, as in the published dataset. Mend "
            "the file, or move it away to use the lists that ship."
        )
    return Benchmark(_checked(entries, path), *lists)


def _templates(text: str) -> tuple[str, ...]:
    """Return the prompts of a list, without the place for a unique token."""
    quoted = [match[1] for match in _PROMPT_LINE.findall(text)]
    return tuple(prompt.replace("{0} {1}", PLACE) for prompt in quoted)


def _checked(entries: Sequence[SubjectEntry], path: Path) -> tuple[SubjectEntry, ...]:
    outside = [entry.name for entry in entries if not is_plain_name(entry.name)]
    if outside:
        raise InputError(
            f"Expected the name of a folder for each subject in {path}; {outside[0]!r} is none. Give the folder's own "
            "name, such as backpack."
        )
    for entry in entries:
        if entry.class_word != printable(entry.class_word):
            raise InputError(
                f"Expected a word or two as the class of {entry.name} in {path}, got {entry.class_word!r}. Leave out line "
                "breaks and control characters."
            )
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if twice or not entries:
        raise InputError(
            f"Expected every subject once in {path}, and at least one; given twice: {twice or 'none'}. Give each a line."
        )
    return tuple(entries)
