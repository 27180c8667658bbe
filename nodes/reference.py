"""Nodes that make references: prepare an image, encode images."""

from dataclasses import replace
from typing import Any

import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from torch import Tensor

from ..dreamcache_core import AdapterSet, InputError, ReferenceCache, prepare_reference_image
from ..dreamcache_core.images.masks import Subject, find_subject, on_white
from ..dreamcache_core.images.reference import subject_box
from ..dreamcache_core.images.sheets import encode_thumbnails
from .host.encode import encode_reference
from .host.model import default_side_px
from .host.report import node_id, report
from .host.sampling import plain_text
from .sockets import (
    MAX_SIDE_PX,
    SUBJECT,
    Reference,
    adapters_input,
    advanced,
    found_by,
    mask_marks_input,
    seed_input,
    square_inputs,
)

MIN_SIDE_PX = 64


class ReferenceImage(io.ComfyNode):
    """Cut the subject out and place it on a plain square."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheReferenceImage",
            display_name="Prepare Reference Image (DreamCache)",
            category="DreamCache",
            description="Cuts the subject out by its mask and centres it on a plain square, as the adapters saw "
            "references in training. A background left in the image leaks into the result.",
            **found_by("cut out", "crop", "remove background", *SUBJECT),
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="Image of the subject. Several in a batch are prepared one by one.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject (or the background, see mask_marks) is. Without it the background stays in the "
                    "image, and comes through in the new ones.",
                ),
                mask_marks_input(),
                *square_inputs(512),
                advanced(
                    io.Combo.Input(
                        "background",
                        options=["white", "grey", "black"],
                        default="white",
                        tooltip="Colour around the subject. White is what the adapters were trained on.",
                    )
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that you generate with: needed at size 0 alone.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="For Encode Reference."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="1 where the subject is; optional for Encode Reference.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        size: int,
        fill: float,
        background: str,
        mask: Tensor | None = None,
        mask_marks: str = "auto",
        model: Any = None,
    ) -> io.NodeOutput:
        """Prepare the images."""
        if size == 0 and model is None:
            raise InputError(
                "size 0 is the model's own, and no model is connected. Connect it, or set size to 512, for SDXL to 1024."
            )
        size = size or default_side_px(model)
        subject = find_subject(image, mask, mask_marks)
        prepared, masks = prepare_reference_image(
            image[..., :3], subject.opacity, size=size, fill=fill, background=background
        )
        preview = ui.PreviewImage(prepared, cls=cls).as_dict()
        return io.NodeOutput(prepared, masks, ui=preview | report(cls, subject.note).as_dict())


class Encode(io.ComfyNode):
    """Read a reference's features once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheEncode",
            display_name="Encode Reference (DreamCache)",
            category="DreamCache",
            description="Lets the model look at the reference image once and keeps what it saw. The result serves any number of "
            "images; Save Reference keeps it.",
            **found_by("reference image"),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that you generate with, LoRAs included; before or after Apply DreamCache, both do.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Image.Input(
                    "image",
                    tooltip="From Prepare Reference Image. Several images in a batch become several references of one "
                    "subject.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The model's CLIP. Not needed with conditioning.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="A text to look at the image with, in place of the empty prompt. The adapters were trained with the empty one.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject is. Less of the background comes through in new images, and each step is faster. "
                    "Without it the whole image counts, the white around the subject too, as in training.",
                ),
                advanced(
                    seed_input(
                        "The same seed gives the same reference. Another one hardly differs."
                    )
                ),
                io.Int.Input(
                    "timestep",
                    default=1,
                    min=0,
                    max=999,
                    tooltip="How noisy the image is when the model looks at it. It must be the adapters' own: connect adapters, and it is.",
                ),
                mask_marks_input(),
                adapters_input(),
            ],
            outputs=[Reference.Output(display_name="reference", tooltip="For Apply DreamCache.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        image: Tensor,
        seed: int,
        timestep: int,
        clip: Any = None,
        conditioning: list[Any] | None = None,
        mask: Tensor | None = None,
        mask_marks: str = "auto",
        adapters: AdapterSet | None = None,
    ) -> io.NodeOutput:
        """Encode the images."""
        text = conditioning or empty_prompt(clip)
        _check_size(image)
        subject = find_subject(image, mask, mask_marks)
        reference = encode_images(
            model,
            vae,
            on_white(image),
            _rows_of(subject, len(image)),
            text,
            seed=seed,
            timestep=timestep,
            adapters=adapters,
            node_id=node_id(cls),
        )
        return io.NodeOutput(reference, ui=report(cls, f"{subject.note}; {reference.describe()}"))


def empty_prompt(clip: Any) -> list[Any]:
    """Encode the empty prompt.

    Raises:
        InputError: There is no CLIP.
    """
    if clip is None:
        raise InputError(
            "Encode Reference needs clip (for the empty prompt) or conditioning; neither is connected. Connect the "
            "CLIP of your checkpoint loader."
        )
    return plain_text(clip.encode_from_tokens_scheduled(clip.tokenize("")))


def encode_images(
    model: Any,
    vae: Any,
    image: Tensor,
    mask: Tensor | None,
    text: list[Any],
    *,
    seed: int = 0,
    timestep: int = 1,
    adapters: AdapterSet | None,
    node_id: str | None,
) -> ReferenceCache:
    """Encode images and cache their features, see ``encode_reference``.

    Args:
        model: The MODEL.
        vae: Its VAE.
        image: (references, height, width, 3) in [0, 1].
        mask: The subject, (references, height, width) in [0, 1], or ``None`` for the whole image.
        text: CONDITIONING of one text.
        seed: Seed of the noise.
        timestep: Training index of the pass, 0 to 999.
        adapters: Those that it is for; they decide about layers and timestep.
        node_id: Node to show the progress at.

    Returns:
        The cache, on the CPU.
    """
    pixels, mask = _crop_to_latent_grid(image, mask, vae.spacial_compression_encode())
    # one by one: an image's latent must not depend on what is encoded with it
    latent = torch.cat([vae.encode(one) for one in pixels.split(1)])
    reference = encode_reference(
        model,
        latent,
        text,
        seed=seed,
        timestep=timestep,
        mask=mask,
        adapters=adapters,
        progress=ProgressBar(len(latent), node_id=node_id),
    )
    return replace(reference, thumbnails=encode_thumbnails(pixels))


def _check_size(image: Tensor) -> None:
    height, width = image.shape[1:3]
    if min(height, width) < MIN_SIDE_PX or max(height, width) > MAX_SIDE_PX:
        raise InputError(
            f"Encode Reference takes images of {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels a side; given {width} x {height}. Put "
            "Prepare Reference Image before it (512 for Stable Diffusion, 1024 for SDXL)."
        )


def _rows_of(subject: Subject, num_images: int) -> Tensor | None:
    """Where the subject of each image is; refuses one that is too small to be seen."""
    if subject.opacity is None:
        return None
    for row, opacity in enumerate(subject.opacity):
        subject_box(opacity, row)
    return subject.opacity.expand(num_images, -1, -1)


def _crop_to_latent_grid(
    image: Tensor, mask: Tensor | None, factor: int
) -> tuple[Tensor, Tensor | None]:
    """Crop the middle to a multiple of the VAE's factor, as the VAE would, but image and mask alike."""
    height, width = (side // factor * factor for side in image.shape[1:3])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    window = (slice(None), slice(top, top + height), slice(left, left + width))
    return image[window], None if mask is None else mask[window]


NODES: list[type[io.ComfyNode]] = [ReferenceImage, Encode]
