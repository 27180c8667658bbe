"""Judge images of DreamBench by DINO and CLIP, and keep the scores in a log that survives interruptions."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...errors import InputError
from ...files.jsonl import append_lines, read_lines
from ...images.files import read_image, read_mask
from ...images.reference import check_mask_aspect, prepare_reference_image
from ...images.tensors import tensor_to_image
from ...pipeline.fingerprint import model_fingerprint
from ..image_metrics import ClipEncoder, DinoEncoder, cosine_similarity
from .dataset import Candidate, Photo, Subject

logger = logging.getLogger(__name__)

CUTOUT_PX = 512
"""Side of the white square that a cut-out subject fills, before the models' own resizing."""


@dataclass(frozen=True)
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

    @property
    def is_sound(self) -> bool:
        """Whether the entries are of their types, which a log may have lost."""
        known, wanted = (
            [self.dino, self.clip_i],
            [self.clip_t, self.masked_dino, self.masked_clip_i],
        )
        known += [value for value in wanted if value is not None]
        return isinstance(self.fingerprint, str) and all(
            isinstance(value, int | float) and math.isfinite(value) for value in known
        )


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
                    if score.is_sound:
                        scores[score.fingerprint] = score
        return scores

    def append(self, scores: Iterable[ImageScore]) -> None:
        """Add scores; they are on the disk when this returns.

        Raises:
            OSError: The disk is full.
        """
        append_lines(self._own, [asdict(score) for score in scores])


def score_candidates(
    candidates: Sequence[Candidate],
    log: ScoreLog,
    *,
    dino: str,
    clip: str,
    device: torch.device,
    batch_size: int,
    has_bar: bool,
) -> None:
    """Judge the images that the log does not hold yet; the models are loaded only if there are any.

    Args:
        candidates: Images of this process; those of one subject follow one another.
        log: Where the scores go, batch by batch.
        dino: Folder of DINO ViT-S/16.
        clip: Folder of CLIP ViT-B/32.
        device: Where the models run.
        batch_size: Images judged at once.
        has_bar: Whether to show progress.

    Raises:
        DreamCacheError: An image, a mask or a model cannot be used.
        OSError: The disk is full.
    """
    fingerprint_of, done = _Fingerprints(dino, clip), log.read()
    named = [(candidate, fingerprint_of(candidate)) for candidate in candidates]
    missing = [(candidate, name) for candidate, name in named if name not in done]
    if not missing:
        return
    scorer = _Scorer(DinoEncoder(dino, device), ClipEncoder(clip, device), batch_size)
    with tqdm(total=len(missing), unit="image", desc="judging", disable=not has_bar) as bar:
        for _, group in groupby(missing, key=lambda pair: pair[0].subject.number):
            for batch in _split(list(group), batch_size):
                log.append(scorer.score(batch))
                bar.update(len(batch))


def current_scores(
    candidates: Sequence[Candidate], log: ScoreLog, *, dino: str, clip: str
) -> list[ImageScore]:
    """Return the scores of images as they are now, once all processes are through.

    Args:
        candidates: All images.
        log: Where their scores are.
        dino: Folder of DINO.
        clip: Folder of CLIP.

    Returns:
        One for each candidate, in order.
    """
    fingerprint_of, done = _Fingerprints(dino, clip), log.read()
    # images of equal contents share a line of the log, so who is who comes from the candidate
    return [replace(done[fingerprint_of(each)], **_identity(each)) for each in candidates]


def _identity(candidate: Candidate) -> dict[str, Any]:
    return {
        "image": candidate.name,
        "subject": candidate.subject.name,
        "prompt_number": candidate.prompt_number,
        "repeat": candidate.repeat,
    }


class _Scorer:
    """Loaded models, and the embeddings of the subject that is being judged."""

    def __init__(self, dino: DinoEncoder, clip: ClipEncoder, batch_size: int) -> None:
        self.dino, self.clip, self.batch_size = dino, clip, batch_size
        self._real_of = lru_cache(maxsize=1)(self._embed_real)

    def score(self, batch: Sequence[tuple[Candidate, str]]) -> list[ImageScore]:
        """Judge images of one subject."""
        candidates = [candidate for candidate, _ in batch]
        real = self._real_of(candidates[0].subject)
        own = self._embed([candidate.photo for candidate in candidates])
        similarity = {key: cosine_similarity(own[key], real[key]) for key in own}
        clip_t = self._clip_t(candidates, own["clip_i"])
        return [
            ImageScore(
                **_identity(candidate),
                prompt=candidate.prompt,
                fingerprint=fingerprint,
                clip_t=clip_t[row],
                **_row_means(similarity, candidate, row),
            )
            for row, (candidate, fingerprint) in enumerate(batch)
        ]

    def _embed_real(self, subject: Subject) -> dict[str, Tensor]:
        batches = list(_split(subject.photos, self.batch_size))
        embedded = [self._embed(batch) for batch in batches]
        return {key: torch.cat([part[key] for part in embedded]) for key in embedded[0]}

    def _embed(self, photos: Sequence[Photo]) -> dict[str, Tensor]:
        """Embed images and their cut-outs; rows without a mask are NaN in the masked ones."""
        loaded = [_load_images(photo) for photo in photos]
        plain = [image for image, _ in loaded]
        cut = {row: image for row, (_, image) in enumerate(loaded) if image is not None}
        result: dict[str, Tensor] = {}
        for key, encode in (("dino", self.dino.images), ("clip_i", self.clip.images)):
            result[key] = encode(plain)
            masked = torch.full_like(result[key], torch.nan)
            if cut:
                masked[list(cut)] = encode(list(cut.values()))
            result[f"masked_{key}"] = masked
        return result

    def _clip_t(self, candidates: Sequence[Candidate], images: Tensor) -> list[float | None]:
        prompts = [candidate.prompt for candidate in candidates]
        texts = list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))
        if not texts:
            return [None] * len(prompts)
        similarity = cosine_similarity(images, self.clip.texts(texts))
        return [
            None if prompt is None else float(similarity[row, texts.index(prompt)])
            for row, prompt in enumerate(prompts)
        ]


def _row_means(similarity: dict[str, Tensor], candidate: Candidate, row: int) -> dict[str, Any]:
    """Return the means over the real images other than the candidate itself; ``None`` where there is no mask."""
    photos = candidate.subject.photos
    others = [i for i, photo in enumerate(photos) if photo.image != candidate.photo.image]
    means = {key: float(values[row, others].nanmean()) for key, values in similarity.items()}
    return {key: None if mean != mean else mean for key, mean in means.items()}


def _load_images(photo: Photo) -> tuple[Image.Image, Image.Image | None]:
    """Read an image, what is transparent on white, and its subject cut out, if there is a mask."""
    image, alpha = read_image(photo.image, str(photo.image))
    mask = alpha if photo.mask is None else read_mask(photo.mask, str(photo.mask))
    if alpha is not None:
        image = image * alpha[..., None] + 1 - alpha[..., None]
    if mask is None:
        return tensor_to_image(image), None
    check_mask_aspect(mask, *image.shape[1:3])
    try:
        cut, _ = prepare_reference_image(image, mask, size=CUTOUT_PX, fill=1.0)
    except InputError as error:  # nothing, or next to nothing, is marked
        logger.warning("%s gets no masked scores: %s", photo.image, error)
        return tensor_to_image(image), None
    return tensor_to_image(image), tensor_to_image(cut)


def _split(entries: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


class _Fingerprints:
    """Tell from the contents of all files involved whether an image was judged as it would be now."""

    def __init__(self, dino: str, clip: str) -> None:
        self._models = [_digest_model(Path(folder)) for folder in (dino, clip)]
        self._of_subject = lru_cache(maxsize=1)(lambda subject: _digest(subject.photos))

    def __call__(self, candidate: Candidate) -> str:
        own, real = _digest([candidate.photo]), self._of_subject(candidate.subject)
        parts = [*self._models, real, own, candidate.prompt]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
        if path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(f"{path.name} {model_fingerprint(path, ())}".encode())
    return digest.hexdigest()
