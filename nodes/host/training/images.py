"""Images, masks and texts of a graph as a training set: paired, checked and encoded once. Knows no U-Net."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....dreamcache_core import InputError
from ....dreamcache_core.data.augmentation import ALL_ALTERATIONS, Alterations, augment_reference
from ....dreamcache_core.data.buckets import aspect_buckets, crop_target, nearest_bucket
from ....dreamcache_core.data.order import sample_seed
from ....dreamcache_core.data.sources.source import Pair
from ....dreamcache_core.images.masks import given_mask, in_words
from ....dreamcache_core.images.reference import check_image, subject_box, subject_opacity
from ..model import check_channels
from ..sampling import plain_text

logger = logging.getLogger(__name__)

EMPTY_TEXT = -1
"""Index of the empty prompt among the texts of a training set."""

ShowPair = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What the loop draws from; latents are unscaled and, like the texts, on the CPU and outside inference mode.

    Attributes:
        targets: Latent of each image, (1, channels, height, width).
        references: Latents of each image's augmented references, all of one size.
        texts: ComfyUI's CONDITIONING of each image, and at ``EMPTY_TEXT`` that of the empty prompt.
    """

    targets: Sequence[Tensor]
    references: Sequence[Sequence[Tensor]]
    texts: Sequence[list[Any]]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)


def make_pairs(
    images: Sequence[Tensor], masks: Sequence[Tensor], captions: Sequence[str], mask_marks: str
) -> tuple[list[Pair], list[str]]:
    """Pair images with their masks and captions.

    Args:
        images: Batches of images, (batch, height, width, 1, 3 or 4) in [0, 1]; alpha counts as a mask.
        masks: Batches of masks, (batch, height, width) or (height, width); may be empty.
        captions: One for each image.
        mask_marks: What 1 in the masks marks, see ``given_mask``.

    Returns:
        One pair for each image; its target and its subject are the same image. A mask that marks everything is none. And
        what was made of the masks, in words.

    Raises:
        InputError: An image or mask cannot be used, the message says which from 1; or the masks are not as many.
    """
    for batch in images:
        check_image(batch)
    flat_images = [image for batch in images for image in batch.split(1)]
    flat_masks, notes = _masks_of(masks, mask_marks, len(flat_images))
    pairs: list[Pair] = []
    for number, (image, mask, caption) in enumerate(
        zip(flat_images, flat_masks, captions, strict=True), start=1
    ):
        try:
            subject = _usable_opacity(image, mask, number - 1)
        except InputError as error:
            raise InputError(
                f"Training image {number} cannot be used with its mask (mask_marks is {mask_marks!r}): {error}"
            ) from error
        colour = image[..., :3].float().clamp(0, 1).expand(-1, -1, -1, 3)
        pairs.append(Pair(colour, colour, subject, caption))
    _warn_about_images(flat_images, pairs)
    return pairs, in_words(notes)


def match_captions(texts: Sequence[str], num_images: int) -> list[str]:
    """Give every image its caption.

    Args:
        texts: A single text with one line for each image or one for all; or a list with one text for each.
        num_images: Number of images.

    Returns:
        A caption for each image, on one line.

    Raises:
        InputError: The numbers do not fit, or there is no text.
    """
    single = len(texts) == 1 and num_images > 1
    # not splitlines: it also breaks at characters that may stand within a caption
    lines = [line for line in texts[0].split("\n") if line.strip()] if single else list(texts)
    captions = [" ".join(line.split()) for line in lines]
    if not any(captions):
        raise InputError(
            "captions is empty. Write what the images show: one line for each image, in their order, or one line "
            "for all of them."
        )
    return _one_for_each(captions, num_images, "captions (one line each)")


def split_conditioning(conditioning: Sequence[list[Any]], num_images: int) -> list[list[Any]]:
    """Give every image its CONDITIONING.

    Args:
        conditioning: CONDITIONINGs of one or several texts each; one text for each image, or one for all.
        num_images: Number of images.

    Returns:
        A CONDITIONING of one plain text for each image.

    Raises:
        InputError: The numbers do not fit.
    """
    texts = [
        plain_text([text], "the captions are", "conditioning")
        for given in conditioning
        for text in given
    ]
    return _one_for_each(texts, num_images, "texts in conditioning")


def encode_texts(clip: Any, captions: Sequence[str]) -> list[list[Any]]:
    """Encode captions, each different one once.

    Args:
        clip: The model's CLIP.
        captions: The captions.

    Returns:
        A CONDITIONING for each.
    """
    known = {
        caption: plain_text(
            clip.encode_from_tokens_scheduled(clip.tokenize(caption)), f"the caption {caption!r} is"
        )
        for caption in dict.fromkeys(captions)
    }
    return [known[caption] for caption in captions]


def encode_pairs(
    pairs: Sequence[Pair],
    texts: Sequence[list[Any]],
    vae: Any,
    *,
    channels: int,
    resolution: int,
    has_buckets: bool,
    num_variants: int,
    seed: int,
    show: ShowPair,
    alterations: Alterations = ALL_ALTERATIONS,
) -> TrainingSet:
    """Encode targets once, and of each image several differently augmented references.

    Source: METHOD.md section 7. Differs from it in: the augmentations are drawn beforehand and come round again.

    Args:
        pairs: The images, from ``make_pairs``.
        texts: CONDITIONING of each image, and last that of the empty prompt.
        vae: The model's VAE.
        channels: Channels of the model's latents.
        resolution: Side of the references and of square targets, pixels.
        has_buckets: Keep the targets' aspect, as far as the buckets have it.
        num_variants: References of each image.
        seed: Seed of the augmentation.
        show: Called with every target and reference, each (1, height, width, 3), once they are encoded.
        alterations: What may happen to references.

    Returns:
        The set.

    Raises:
        InputError: The VAE is not the model's.
    """
    square = (resolution, resolution)
    buckets = aspect_buckets(resolution) if has_buckets else (square,)
    targets: list[Tensor] = []
    references: list[list[Tensor]] = []
    for index, pair in enumerate(pairs):
        height, width = pair.target.shape[1:3]
        target = crop_target(pair.target, *nearest_bucket(height, width, buckets))
        targets.append(_normal_tensor(vae.encode(target)))
        check_channels(targets[-1], channels)
        references.append([])
        for variant in range(num_variants):
            # seed + 1: not the numbers that the loop draws noise from
            place = sample_seed(seed + 1, variant * len(pairs) + index)
            generator = torch.Generator().manual_seed(place)
            reference = augment_reference(
                pair.subject,
                pair.mask,
                size=resolution,
                generator=generator,
                alterations=alterations,
            )
            references[-1].append(_normal_tensor(vae.encode(reference)))
            show(target, reference)
    return TrainingSet(targets, references, [_normal_texts(text) for text in texts])


def _masks_of(
    masks: Sequence[Tensor], marks: str, num_images: int
) -> tuple[list[Tensor | None], list[str]]:
    """Masks one by one with the notes on them, see ``given_mask``."""
    single = [row for mask in masks for row in mask.reshape(-1, *mask.shape[-2:]).split(1)]
    given = [given_mask(row, marks) for row in single]
    flat = [row for row, _ in given]
    if not any(row is not None for row in flat):
        return [None] * num_images, []
    if len(flat) != num_images:
        raise InputError(
            f"Expected one mask for each of the {num_images} images, in their order; given {len(flat)}. Leave masks "
            "unconnected where there are none."
        )
    return flat, [note for _, notes in given for note in notes or [""]]


def _usable_opacity(image: Tensor, mask: Tensor | None, row: int) -> Tensor | None:
    """Where the subject is, at the image's size; ``None`` for everywhere."""
    opacity = subject_opacity(image, mask)
    if opacity is None or bool((opacity >= 1).all()):
        return None
    subject_box(opacity[0], row)
    return opacity


def _warn_about_images(images: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
    num_whole = sum(pair.mask is None for pair in pairs)
    if num_whole:
        logger.warning(
            "%d of %d training images have no mask: all of the image counts as the subject, and its background "
            "will leak into the results.",
            num_whole,
            len(pairs),
        )
    num_cut_out = sum(p.shape[-1] == 4 and bool((p[..., 3] < 1).any()) for p in images)
    if num_cut_out:
        logger.warning(
            "%d of %d training images are cut-outs: training sees the hidden pixels under their transparent parts, "
            "often plain black, and the adapters learn to draw those. Give whole photographs, with the subject in masks.",
            num_cut_out,
            len(pairs),
        )


def _one_for_each(items: list[Any], num_images: int, name: str) -> list[Any]:
    if len(items) not in (1, num_images):
        raise InputError(
            f"Expected 1 or {num_images} {name}, as there are {num_images} images; given {len(items)}."
        )
    return items * num_images if len(items) == 1 else items


@torch.inference_mode(False)
def _normal_tensor(tensor: Tensor) -> Tensor:
    """Copy a tensor out of inference mode, in which ComfyUI executes nodes and autograd cannot use it."""
    return tensor.detach().cpu().float().clone()


@torch.inference_mode(False)
def _normal_texts(conditioning: list[Any]) -> list[Any]:
    """Copy a CONDITIONING of one text out of inference mode."""
    return [
        [
            text.clone(),
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()},
        ]
        for text, options in conditioning
    ]
