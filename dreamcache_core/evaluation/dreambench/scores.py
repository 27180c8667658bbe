"""Judge images of DreamBench by DINO and CLIP."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...errors import InputError
from ...images.files import read_image, read_mask
from ...images.reference import check_mask_aspect, prepare_reference_image
from ...images.tensors import tensor_to_image
from ..image_metrics import ClipEncoder, DinoEncoder, cosine_similarity
from .dataset import Candidate, Photo, Subject
from .log import Fingerprints, ImageScore, ScoreLog

logger = logging.getLogger(__name__)

CUTOUT_PX = 512
"""Side of the white square that a cut-out subject fills, before the models' own resizing."""


def score_candidates(
    candidates: Sequence[Candidate],
    log: ScoreLog,
    *,
    dino: str,
    clip: str,
    device: torch.device,
    batch_size: int = 32,
    has_bar: bool = False,
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
    fingerprint_of, done = Fingerprints(dino, clip), log.read()
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
    fingerprint_of, done = Fingerprints(dino, clip), log.read()
    # images of equal contents share a line of the log, so who is who comes from the candidate
    return [
        dataclasses.replace(
            done[fingerprint_of(candidate)],
            image=candidate.name,
            subject=candidate.subject.name,
            prompt_number=candidate.prompt_number,
            repeat=candidate.repeat,
        )
        for candidate in candidates
    ]


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
                image=candidate.name,
                subject=candidate.subject.name,
                prompt_number=candidate.prompt_number,
                repeat=candidate.repeat,
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
    others = [
        index
        for index, photo in enumerate(candidate.subject.photos)
        if photo.image != candidate.photo.image
    ]
    means = {key: float(values[row, others].nanmean()) for key, values in similarity.items()}
    return {key: None if mean != mean else mean for key, mean in means.items()}


def _load_images(photo: Photo) -> tuple[Image.Image, Image.Image | None]:
    """Read an image, what is transparent on white, and its subject cut out, if there is a mask."""
    image, alpha = read_image(photo.image)
    mask = alpha if photo.mask is None else read_mask(photo.mask)
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
