"""The folders of DreamBench: real images of the subjects, and the images that are judged.

::

    dataset/dog/00.jpg          real images, one of which is the reference
    dataset/dog/00_mask.png     if there is one: white where the subject is; also 00_Mask.png, 00-mask.png, 00.mask.png
    images/dog/07_2.png         image 2 for prompt 7, both counted from 0
    images/dog/07_2_mask.png    if there is one
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ...images.files import is_image_name
from ...names import printable
from .prompts import Benchmark, SubjectEntry

logger = logging.getLogger(__name__)

_MASK_STEM = re.compile(r"(.+)[_.-]mask", re.IGNORECASE | re.DOTALL)
_IMAGE_STEM = re.compile(r"(\d+)_(\d+)")
NUM_SHOWN = 3
"""Files that a warning names."""


@dataclass(frozen=True)
class Photo:
    """A real image of a subject, and its mask where there is one."""

    image: Path
    mask: Path | None


@dataclass(frozen=True)
class Subject:
    """A subject with its images and prompts.

    Attributes:
        number: Its place in the list, from 0, whether or not those before it are there.
        entry: Its line in the list.
        prompts: With its class word.
        photos: Its real images, by name.
        reference: That of them which the generator sees.
    """

    number: int
    entry: SubjectEntry
    prompts: tuple[str, ...]
    photos: tuple[Photo, ...]
    reference: Photo

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.entry.name


@dataclass(frozen=True)
class Item:
    """An image to be generated: the ``repeat``-th for a prompt, both counted from 0."""

    subject: Subject
    prompt_number: int
    repeat: int

    @property
    def prompt(self) -> str:
        """What it shows."""
        return self.subject.prompts[self.prompt_number]

    @property
    def name(self) -> str:
        """Its file below the folder of images."""
        return f"{self.subject.name}/{self.prompt_number:02d}_{self.repeat}.png"


@dataclass(frozen=True)
class Candidate:
    """An image to be judged: a generated image, or (without prompt) one of the real images.

    Attributes:
        subject: Whom it should show.
        photo: The image.
        prompt_number: Of the prompt, from 0.
        repeat: Number among the images of the prompt, from 0.
    """

    subject: Subject
    photo: Photo
    prompt_number: int | None = None
    repeat: int | None = None

    @property
    def name(self) -> str:
        """Folder and file."""
        place = "real/" if self.prompt_number is None else ""
        return printable(f"{place}{self.subject.name}/{self.photo.image.name}")

    @property
    def prompt(self) -> str | None:
        """What it should show."""
        return None if self.prompt_number is None else self.subject.prompts[self.prompt_number]


def read_subjects(
    dataset: str | Path, benchmark: Benchmark, names: Sequence[str] = ()
) -> list[Subject]:
    """Find the subjects' images.

    Args:
        dataset: Folder with a folder for each subject.
        benchmark: The lists.
        names: Those wanted; empty: all. A subject of the list without a folder is left out with a warning, one that
            is named here must be there.

    Returns:
        The subjects, in the order of the list.

    Raises:
        InputError: There is no such folder, name, image or reference, or a mask is not that of one image.
    """
    root = Path(dataset)
    known = sorted(entry.name for entry in benchmark.subjects)
    if unknown := sorted(set(names).difference(known)):
        raise InputError(
            f"Expected names of the list of subjects, got {', '.join(unknown)}. It has: {', '.join(known)}."
        )
    subjects: list[Subject] = []
    missing: list[str] = []
    for number, entry in enumerate(benchmark.subjects):
        if names and entry.name not in names:
            continue
        photos = _photos(root / entry.name)
        if not photos:
            missing.append(entry.name)
            continue
        reference = _reference(entry, photos, root)
        subjects.append(Subject(number, entry, benchmark.prompts_of(entry), photos, reference))
    if not subjects or (missing and names):
        raise InputError(
            f"Expected a folder with images for each subject in {root}; there are none of {', '.join(missing)}. "
            "Give --dataset the folder that holds folders such as backpack and cat2."
        )
    if missing:
        logger.warning(
            "%d subjects have no images in %s and are left out: %s. The figures are not those of the whole benchmark.",
            len(missing),
            root,
            ", ".join(missing),
        )
    _name_other_folders(root, benchmark)
    return subjects


def all_items(subjects: Sequence[Subject], images_per_prompt: int) -> list[Item]:
    """List the images of the protocol, subject by subject.

    Args:
        subjects: The subjects.
        images_per_prompt: 4 in the protocol.

    Returns:
        Every prompt of every subject so many times.
    """
    return [
        Item(subject, prompt_number, repeat)
        for subject in subjects
        for prompt_number in range(len(subject.prompts))
        for repeat in range(images_per_prompt)
    ]


def find_candidates(
    images: str | Path, benchmark: Benchmark, subjects: Sequence[Subject], images_per_prompt: int
) -> list[Candidate]:
    """List what is to be judged: the images that are there, and the real images, for comparison.

    Args:
        images: Folder with a folder for each subject. Images with other names than ``07_2.png``, and folders that are no
            subject's, are left out with a warning.
        benchmark: The lists.
        subjects: The subjects.
        images_per_prompt: 4 in the protocol; further images are left out.

    Returns:
        Subject by subject: its images by prompt, then its real images, where it has several.

    Raises:
        InputError: There is no image at all, or one has a number that its subject has no prompt for, or two have the
            same number.
    """
    found: list[Candidate] = []
    others: list[str] = []
    for subject in subjects:
        found += _generated(Path(images), subject, images_per_prompt, others)
        if len(subject.photos) > 1:
            found += [Candidate(subject, photo) for photo in subject.photos]
    if others:
        logger.warning(
            "%d images in %s are left out, as their names are not PROMPT_IMAGE, such as 07_2.png: %s.",
            len(others),
            images,
            _shown(others),
        )
    _name_other_folders(Path(images), benchmark)
    if all(candidate.prompt_number is None for candidate in found):
        raise InputError(
            f"Expected images such as {subjects[0].name}/00_0.png (prompt 0, image 0) in {images}; there are none. "
            "Check the folder, or make them with --generate."
        )
    return found


def _generated(
    root: Path, subject: Subject, images_per_prompt: int, others: list[str]
) -> list[Candidate]:
    """List the images of a subject by number; note those whose names are none."""
    numbered: dict[tuple[int, int], Photo] = {}
    for photo in _photos(root / subject.name):
        match = _IMAGE_STEM.fullmatch(photo.image.stem)
        if match is None:
            others.append(f"{subject.name}/{photo.image.name}")
            continue
        number = int(match[1]), int(match[2])
        if number[0] >= len(subject.prompts) or number in numbered:
            raise InputError(
                f"Expected every image once, as PROMPT_IMAGE.png with prompts 0 ... {len(subject.prompts) - 1}; "
                f"{photo.image} is another. Count from 0, and remove what is double."
            )
        numbered[number] = photo
    return [
        Candidate(subject, photo, *number)
        for number, photo in sorted(numbered.items())
        if number[1] < images_per_prompt
    ]


def _photos(folder: Path) -> tuple[Photo, ...]:
    """List a folder's images with their masks, by name; name masks of no image, refuse one of several."""
    images: list[Path] = []
    masks: dict[str, list[Path]] = {}
    for path in _image_files(folder):
        match = _MASK_STEM.fullmatch(path.stem)
        (masks.setdefault(match[1], []) if match else images).append(path)
    for stem, given in masks.items():
        marked = [path for path in images if path.stem == stem]
        if marked and len(marked) + len(given) > 2:
            names = ", ".join(path.name for path in (*marked, *given))
            raise InputError(
                f"Expected one image and one mask called {stem} in {folder}, got {names}. Rename or remove what is double."
            )
    stems = {path.stem for path in images}
    lost = [path.name for stem, given in masks.items() if stem not in stems for path in given]
    if lost:
        logger.warning("%d masks in %s belong to no image: %s.", len(lost), folder, _shown(lost))
    return tuple(Photo(path, *masks.get(path.stem, [None])) for path in images)


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if is_image_name(path.name)]


def _name_other_folders(root: Path, benchmark: Benchmark) -> None:
    """Warn of folders with images that belong to no subject of the list."""
    known = {entry.name for entry in benchmark.subjects}
    folders = sorted(root.iterdir()) if root.is_dir() else []
    others = [each.name for each in folders if each.name not in known and _image_files(each)]
    if others:
        logger.warning(
            "%d folders of %s are not read, as the list of subjects does not have them: %s. Give a list with --subject_list.",
            len(others),
            root,
            printable(", ".join(others)),
        )


def _shown(names: Sequence[str]) -> str:
    more = " ..." if len(names) > NUM_SHOWN else ""
    return printable(", ".join(names[:NUM_SHOWN])) + more


def _reference(entry: SubjectEntry, photos: Sequence[Photo], root: Path) -> Photo:
    for photo in photos:
        if entry.reference in ("", photo.image.name):
            return photo
    raise InputError(
        f"Expected the reference {entry.reference} in {root / entry.name}; there is none. Mend the list of subjects."
    )
