"""Checks of what ``DreamCachePipeline`` is called with; each raises ``InputError``."""

import math
import re
from collections.abc import Sequence, Sized
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import check_range
from ..errors import InputError
from ..images.reference import check_image, check_mask_aspect
from ..method.blending import ReferenceUse

OutputType = Literal["pil", "pt", "latent"]
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""What no tokenizer takes."""
Generators = torch.Generator | Sequence[torch.Generator] | None


def cpu_generator(seed: int) -> torch.Generator:
    """Make the generator of a seed."""
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InputError(f"A seed is a whole number in 0 ... 2^64 - 1; given {seed!r}.")
    return torch.Generator("cpu").manual_seed(seed)


def list_of_uses(uses: Any) -> list[ReferenceUse]:
    """Make a list of one or several uses."""
    listed = [uses] if isinstance(uses, ReferenceUse) else uses
    if not isinstance(listed, Sequence) or not all(isinstance(u, ReferenceUse) for u in listed):
        raise InputError(
            f"Expected uses to be a ReferenceUse or a list of them; given {type(uses).__name__}. Build one with "
            "ReferenceUse(reference, adapters)."
        )
    return list(listed)


def list_of_prompts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Make equally long lists of prompts and negative prompts."""
    negative_prompt = "" if negative_prompt is None else negative_prompt
    prompts, negatives = map(_list_of_texts, (prompt, negative_prompt))
    if isinstance(negative_prompt, str):
        negatives *= len(prompts)
    if not prompts or len(negatives) != len(prompts):
        raise InputError(
            f"Expected at least one prompt and one negative prompt for all or for each; given {len(prompts)} "
            f"prompts and {len(negatives)} negative prompts."
        )
    return prompts, negatives


def _list_of_texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, bytes) or not isinstance(texts, Sequence) or not all(map(_is_text, texts)):
        raise InputError(f"Expected a prompt or a list of them; given {given!r}.")
    return list(texts)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _LONE_SURROGATE.search(value)


def list_of_generators(generator: Generators, num_images: int) -> Generators:
    """Return what diffusers takes: one generator, or a list with one for each image."""
    listed = generator if isinstance(generator, Sequence) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in listed):
        raise InputError(
            f"Expected a torch.Generator, or a list of them; given {generator!r}. Make one of a seed with "
            "torch.Generator().manual_seed(seed)."
        )
    if isinstance(generator, Sequence):
        check_one_or_each(generator, "generator", num_images)
        return list(generator)
    return generator


def check_images(image: Tensor, mask: Tensor | None, factor: int) -> None:
    """Refuse images that a VAE of so many pixels a latent cannot take, and masks that do not fit them."""
    check_image(image)
    height, width, channels = image.shape[1:]
    if channels != 3 or height % factor or width % factor:
        raise InputError(
            f"Expected images of (references, height, width, 3) with sides that are multiples of {factor}; "
            f"given {tuple(image.shape)}. Use prepare_reference_image first."
        )
    if mask is not None:
        if mask.ndim != 3:
            raise InputError(
                f"Expected a mask of (1 or references, height, width); given {tuple(mask.shape)}."
            )
        check_one_or_each(mask, "mask", len(image))
        check_mask_aspect(mask, height, width)


def check_settings(guidance_scale: float, num_steps: int, scheduler: Any, output_type: str) -> None:
    """Refuse numbers and words out of range."""
    if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale must be a finite number; given {guidance_scale!r}.")
    check_count("num_inference_steps", num_steps, 1, scheduler.config.num_train_timesteps)
    if output_type not in ("pil", "pt", "latent"):
        raise InputError(f"output_type must be 'pil', 'pt' or 'latent'; given {output_type!r}.")


def check_count(name: str, value: float, low: int, high: int | None = None) -> None:
    """Refuse what is no whole number, or out of range."""
    if not isinstance(value, Integral):
        raise InputError(f"{name} must be a whole number; given {value!r}.")
    check_range(name, value, low, high)


def check_one_or_each(values: Sized, name: str, num_images: int) -> None:
    """Refuse what is neither one for all images nor one for each."""
    if len(values) not in (1, num_images):
        raise InputError(
            f"Expected one {name}, or one for each of the {num_images} images; given {len(values)}."
        )
