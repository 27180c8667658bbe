"""What was judged: a log that several processes write and that survives interruptions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from ...files.jsonl import append_lines, read_lines
from .dataset import Candidate, Photo, Subject

METRICS = ("dino", "clip_i", "clip_t", "masked_dino", "masked_clip_i")


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """What one image is worth; all metrics are cosine similarities in [-1, 1], higher is better.

    Attributes:
        image: Folder and file; ``real/...`` for a real image, which is compared with the subject's others.
        subject: Name.
        prompt_number: From 0; ``None`` for a real image, as for the next two.
        repeat: From 0.
        prompt: Text.
        fingerprint: Of everything that the metrics depend on.
        dino: Mean over the real images, as for ``clip_i``.
        clip_i: CLIP, image with image.
        clip_t: CLIP, image with prompt.
        masked_dino: Between cut-out subjects, as ``masked_clip_i``; ``None`` without masks.
        masked_clip_i: See ``masked_dino``.
    """

    image: str
    subject: str
    prompt_number: int | None
    repeat: int | None
    prompt: str | None
    fingerprint: str
    dino: float
    clip_i: float
    clip_t: float | None
    masked_dino: float | None
    masked_clip_i: float | None

    @property
    def is_real(self) -> bool:
        """Whether it is of a real image."""
        return self.prompt_number is None


class Fingerprints:
    """Tell whether an image was judged as it would be now, from the contents of all files involved."""

    def __init__(self, dino: str | Path, clip: str | Path) -> None:
        """Take stock of the models: their configurations, and the sizes of their weights.

        Args:
            dino: Folder of DINO.
            clip: Folder of CLIP.
        """
        self._models = [_digest_model(Path(folder)) for folder in (dino, clip)]
        self._of_subject = lru_cache(maxsize=1)(self._digest_subject)

    def __call__(self, candidate: Candidate) -> str:
        """Return a candidate's fingerprint, hexadecimal.

        Raises:
            OSError: A file cannot be read.
        """
        own = _digest([candidate.photo])
        parts = [*self._models, self._of_subject(candidate.subject), own, candidate.prompt]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _digest_subject(self, subject: Subject) -> str:
        return _digest(subject.photos)


class ScoreLog:
    """The folder's ``scores-*.jsonl``, one for each process: a line for each judged image."""

    def __init__(self, folder: Path, process_index: int = 0) -> None:
        """Choose the log of this process; nothing is written.

        Args:
            folder: Existing folder of the results.
            process_index: Of this process.
        """
        self.folder = folder
        self._own = folder / f"scores-{process_index:05d}.jsonl"

    def read(self) -> dict[str, ImageScore]:
        """Return the scores of all processes by fingerprint; lines that are cut short are left out."""
        scores: dict[str, ImageScore] = {}
        for path in sorted(self.folder.glob("scores-*.jsonl")):
            for entry in read_lines(path):
                with suppress(TypeError):
                    score = ImageScore(**entry)
                    scores[score.fingerprint] = score
        return scores

    def append(self, scores: Iterable[ImageScore]) -> None:
        """Add scores; they are on the disk when this returns.

        Raises:
            OSError: The disk is full.
        """
        append_lines(self._own, map(dataclasses.asdict, scores))


def _digest(photos: Sequence[Photo]) -> str:
    digest = hashlib.sha256()
    for photo in photos:
        for path in (photo.image, photo.mask):
            content = b"" if path is None else path.read_bytes()
            digest.update(f"{path is None}{len(content)} ".encode() + content)
    return digest.hexdigest()


def _digest_model(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix == ".json":
            digest.update(path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()
