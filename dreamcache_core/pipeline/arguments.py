"""Checks of what ``DreamCachePipeline`` is called with."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..images.reference import check_image, check_mask_aspect
from ..method.blending import ReferenceUse

OutputType = Literal["pil", "pt", "latent"]
Generators = torch.Generator | Sequence[torch.Generator] | None


def cpu_generator(seed: int) -> torch.Generator:
    """Make the generator of a seed.

    Raises:
        InputError: The seed is no whole number of 64 bits.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InputError(f"A seed is a whole number in 0 ... 2^64 - 1; given {seed!r}.")
    return torch.Generator("cpu").manual_seed(seed)


def list_of_uses(uses: Any) -> list[ReferenceUse]:
    """Make a list of one or several uses.

    Raises:
        InputError: It is something else.
    """
    listed = [uses] if isinstance(uses, ReferenceUse) else uses
    if not isinstance(listed, Sequence) or not all(isinstance(u, ReferenceUse) for u in listed):
        raise InputError(
            f"Expected uses to be a ReferenceUse or a list of them; given {type(uses).__name__}. Build one with "
            "ReferenceUse(reference, adapters)."
        )
    return list(listed)


def list_of_prompts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str]
) -> tuple[list[str], list[str]]:
    """Make equally long lists of prompts and negative prompts.

    Raises:
        InputError: There is no prompt, or the numbers differ.
    """
    if not isinstance(prompt, (str, Sequence)):
        raise InputError(f"Expected a prompt or a list of them; given {type(prompt).__name__}.")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    is_one = isinstance(negative_prompt, str)
    negatives = [negative_prompt] * len(prompts) if is_one else list(negative_prompt)
    if not prompts or len(negatives) != len(prompts):
        raise InputError(
            f"Expected at least one prompt and one negative prompt for all or for each; given {len(prompts)} "
            f"prompts and {len(negatives)} negative prompts."
        )
    return prompts, negatives


def check_images(image: Tensor, mask: Tensor | None, factor: int) -> None:
    """Refuse reference images that the VAE cannot take, and masks that do not fit them.

    Args:
        image: Should be (references, height, width, 3) in [0, 1].
        mask: Should be (1 or references, height, width).
        factor: Pixels for each cell of the latent.

    Raises:
        InputError: They are otherwise.
    """
    check_image(image)
    height, width, channels = image.shape[1:]
    if channels != 3 or height % factor or width % factor:
        raise InputError(
            f"Expected images of (references, height, width, 3) with sides that are multiples of {factor}; "
            f"given {tuple(image.shape)}. Use prepare_reference_image first."
        )
    if mask is not None:
        if mask.ndim != 3 or len(mask) not in (1, len(image)):
            raise InputError(
                f"Expected a mask of (references, height, width), one for each of {len(image)} images; given "
                f"{tuple(mask.shape)}."
            )
        check_mask_aspect(mask, height, width)


def check_settings(guidance_scale: float, num_images: int, output_type: str) -> None:
    """Refuse numbers and words out of range.

    Raises:
        InputError: One is.
    """
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale must be a finite number; given {guidance_scale}.")
    if num_images < 1:
        raise InputError(f"Expected at least one image; given {num_images}.")
    if output_type not in ("pil", "pt", "latent"):
        raise InputError(f"output_type must be 'pil', 'pt' or 'latent'; given {output_type!r}.")


def check_regions(uses: Sequence[ReferenceUse], num_images: int) -> None:
    """Refuse region masks that are neither one for all images nor one each.

    Raises:
        InputError: There are others.
    """
    for use in uses:
        if use.regions is not None and len(use.regions) not in (1, num_images):
            raise InputError(
                f"Expected one region mask, or one for each of the {num_images} images; given {len(use.regions)}."
            )


def check_generators(generator: Generators, num_images: int) -> Generators:
    """Refuse lists of generators of another length than the images.

    Raises:
        InputError: The lengths differ.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if len(generator) != num_images:
        raise InputError(
            f"Expected one generator, or one for each of the {num_images} images; given {len(generator)}."
        )
    return list(generator)
