"""Cut the subject out of a reference image, place it on a plain square; knows no files."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

BACKGROUNDS = {"white": 1.0, "grey": 0.5, "black": 0.0}
"""Background name to its value in [0, 1], the same in all three channels."""

MIN_SIDE_PX = 8
"""An image or a subject whose longer side is below this many pixels is refused."""

SUBJECT_THRESHOLD = 0.1
"""Mask values from here on count as subject when its bounding box is measured."""

ASPECT_TOLERANCE = 0.02
"""Aspects that differ by no more than this share count as equal."""

RANGE_TOLERANCE = 0.1
"""Values this far outside [0, 1] (overshoot of resamplers) are clamped, those beyond refused."""


def prepare_reference_image(
    image: Tensor,
    mask: Tensor | None = None,
    *,
    size: int = 512,
    fill: float = 0.85,
    background: str = "white",
) -> tuple[Tensor, Tensor]:
    """Cut out the subject, resize it and place it centred on a plain square.

    Source: DreamCache, training references. Differs from it in: the place and the size are fixed
    (centred, ``fill``) where training draws them at random.

    Args:
        image: Images of the subject, (batch, height, width, channels), any float dtype, values
            in [0, 1]; an overshoot of up to 0.1 is clamped. 1 channel is grey, 3 are red, green
            and blue, a 4th is alpha (not premultiplied; 0 = transparent).
        mask: Where the subject is, (batch or 1, height, width) or (height, width), 1 = subject.
            Another size of the same aspect (see ``check_mask_aspect``) is resized. Alpha and mask
            are multiplied. With neither, the whole image is the subject. A subject is cropped
            to the bounding box of its mask values from 0.1 on.
        size: Side of the square, pixels; a multiple of 8 in 64 ... 2048.
        fill: Share of the square's side that the subject's longer side takes, in (0, 1]; 1 touches
            the border.
        background: ``white``, ``grey`` or ``black``.

    Returns:
        The images, (batch, size, size, 3), and their masks, (batch, size, size), 1 = subject
        (without mask and alpha: the pasted rectangle). Both float32 in [0, 1], on the
        device of ``image``.

    Raises:
        InputError: An argument is out of range or misshapen, the image is smaller than 8 pixels,
            the mask is empty or has another aspect or batch than the image.
    """
    long_side = check_placement(size, fill, background)
    check_image(image)
    opacity = subject_opacity(image, mask)
    shade = BACKGROUNDS[background]
    images = image.new_full((len(image), size, size, 3), shade, dtype=torch.float32)
    masks = image.new_zeros((len(image), size, size), dtype=torch.float32)
    for row in range(len(image)):
        row_opacity = None if opacity is None else opacity[row if len(opacity) > 1 else 0]
        colour, subject = cut_out_subject(image[row], row_opacity, long_side, row)
        height, width = subject.shape
        top, left = (size - height) // 2, (size - width) // 2
        place = (row, slice(top, top + height), slice(left, left + width))
        images[place] = colour + shade * (1 - subject[..., None])
        masks[place] = subject
    return images.clamp_(0, 1), masks


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize a mask by averaging the area under each new pixel; zeros and ones stay exact.

    Args:
        mask: (batch, height, width) or (height, width), any dtype, values in [0, 1].
        height: New height, pixels or tokens, at least 1.
        width: New width, pixels or tokens, at least 1.

    Returns:
        (batch or 1, height, width), float32, on the device of ``mask``.

    Raises:
        InputError: The mask is misshapen, not finite or outside [0, 1].
    """
    mask = check_mask(mask)
    return F.interpolate(mask[:, None], size=(height, width), mode="area")[:, 0]


def has_aspect(mask: Tensor, height: int, width: int) -> bool:
    """Whether a mask, (..., height, width), has the aspect of an image or latent.

    Aspects may differ by 2 %, and by one pixel of the smallest side among the two, as the
    rounding of a size to whole latents brings about.
    """
    mask_height, mask_width = mask.shape[-2:]
    sides = (mask_height, mask_width, height, width)
    if min(sides) < 1:
        return False
    one, other = mask_width * height, mask_height * width
    return abs(one - other) / max(one, other) <= max(ASPECT_TOLERANCE, 1 / min(sides))


def check_mask_aspect(mask: Tensor, height: int, width: int) -> None:
    """Refuse a mask whose aspect is not that of the image or latent it belongs to, see ``has_aspect``.

    Args:
        mask: (..., height, width), any dtype.
        height: Height of the image or latent.
        width: Width of the image or latent, in the same unit.

    Raises:
        InputError: The aspects differ by more; the message names both sizes.
    """
    if has_aspect(mask, height, width):
        return
    mask_height, mask_width = mask.shape[-2:]
    raise InputError(
        f"Expected a mask of the image's aspect, {width} x {height} (width x height), got a mask "
        f"of {mask_width} x {mask_height}. Make the mask from this image, or crop both alike."
    )


def check_placement(size: int, fill: float, background: str = "white") -> int:
    """Check the settings of ``prepare_reference_image``.

    Args:
        size: Side of the square, pixels.
        fill: Share of it that the subject's longer side takes.
        background: Name of the colour around it.

    Returns:
        Length of the subject's longer side, pixels.

    Raises:
        InputError: A setting is out of range.
    """
    if not isinstance(size, int) or size % 8 or not 64 <= size <= 2048:
        raise InputError(
            f"Expected size to be a multiple of 8 in 64 ... 2048 pixels, got {size!r}. "
            "Use 512 for Stable Diffusion 1 and 2, 1024 for SDXL."
        )
    if not isinstance(fill, int | float) or not 0 < fill <= 1 or not (side := round(fill * size)):
        raise InputError(
            f"Expected fill above 0 and at most 1, so that the subject has a pixel of {size}, got {fill!r}. Use 0.7 to "
            "1.0, as in training."
        )
    if background not in BACKGROUNDS:
        raise InputError(
            f"Expected background to be one of {', '.join(BACKGROUNDS)}, got {background!r}. "
            "Use white, as in training."
        )
    return side


def check_image(image: Tensor) -> None:
    """Refuse what is no image of usable size.

    Args:
        image: To be (batch, height, width, 1, 3 or 4 channels), any float dtype, values in [0, 1].

    Raises:
        InputError: It is not; the message says what it is.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise InputError(
            "Expected an image tensor of (batch, height, width, 1, 3 or 4 channels), got "
            f"{_describe(image)}. Put the channels last and add the batch axis."
        )
    if not image.is_floating_point():
        raise InputError(
            f"Expected a float image in [0, 1], got {image.dtype}. Divide by its largest value."
        )
    batch, height, width, _ = image.shape
    if batch < 1 or min(height, width) < 1 or max(height, width) < MIN_SIDE_PX:
        raise InputError(
            f"Expected at least one image whose longer side is {MIN_SIDE_PX} pixels or more, got "
            f"{batch} of {width} x {height} (width x height). Use a larger image."
        )
    _check_range(image, "image")


def check_mask(mask: Tensor) -> Tensor:
    """Refuse what is not a mask.

    Args:
        mask: (batch, height, width) or (height, width), any dtype, values in [0, 1].

    Returns:
        (batch or 1, height, width), float32, clamped to [0, 1].

    Raises:
        InputError: The mask is misshapen, not finite or outside [0, 1].
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or mask.numel() == 0:
        raise InputError(
            "Expected a mask tensor of (batch, height, width) or (height, width), got "
            f"{_describe(mask)}. Take one channel, without the channel axis."
        )
    _check_range(mask, "mask")
    return mask.float().clamp(0, 1).reshape(-1, *mask.shape[-2:])


def fit_mask(
    mask: Tensor, num_images: int, height: int, width: int, *, name: str = "mask"
) -> Tensor:
    """Refuse a mask that does not fit the images it is for.

    Args:
        mask: (batch, height, width) or (height, width), any dtype, values in [0, 1].
        num_images: Number of images or latents.
        height: Their height.
        width: Their width, in the same unit.
        name: What it is called, for the message.

    Returns:
        (``num_images`` or 1, height, width) at the mask's own size, float32, clamped to [0, 1].

    Raises:
        InputError: The mask is misshapen, out of range, or of another aspect or batch.
    """
    mask = check_mask(mask)
    if len(mask) not in (1, num_images):
        raise InputError(
            f"Expected one {name}, or one for each of the {num_images} images, got {len(mask)}. "
            "Give batches of equal length."
        )
    check_mask_aspect(mask, height, width)
    return mask


def subject_opacity(image: Tensor, mask: Tensor | None) -> Tensor | None:
    """Tell where the subject of each image is, by alpha and mask.

    Args:
        image: Images as ``check_image`` accepts them, (batch, height, width, 1, 3 or 4 channels).
        mask: See ``prepare_reference_image``.

    Returns:
        Alpha times mask, (batch or 1, height, width), float32 in [0, 1], 1 = subject, at the
        images' size; ``None`` where there is neither.

    Raises:
        InputError: The mask is misshapen, out of range, or of another aspect or batch.
    """
    alpha = image[..., 3].float().clamp(0, 1) if image.shape[-1] == 4 else None
    if mask is None:
        return alpha
    batch, height, width, _ = image.shape
    mask = fit_mask(mask, batch, height, width).to(image.device)
    if mask.shape[-2] > height:
        mask = resize_mask(mask, height, width)
    elif mask.shape[-2:] != (height, width):
        mask = _snap(resize_smoothly(mask[:, None], height, width, mode="bilinear"))[:, 0]
    return mask if alpha is None else mask * alpha


def subject_box(opacity: Tensor, row: int = 0) -> tuple[slice, slice]:
    """Find the bounding box of a subject.

    Args:
        opacity: One row of ``subject_opacity``, (height, width).
        row: Its index in the batch, for messages.

    Returns:
        The rows and the columns with a value of 0.1 or more.

    Raises:
        InputError: There is none, or the longer side of the box is below 8 pixels.
    """
    is_subject = opacity >= SUBJECT_THRESHOLD
    rows = is_subject.any(dim=1).nonzero().flatten().tolist()
    columns = is_subject.any(dim=0).nonzero().flatten().tolist()
    if not rows:
        raise InputError(
            f"Expected a mask that marks the subject with 1, got an empty one for image "
            f"{row + 1} (largest value {float(opacity.max()):.3g}). Paint the subject, or invert "
            "the mask."
        )
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    height, width = (side.stop - side.start for side in box)
    if max(height, width) < MIN_SIDE_PX:
        raise InputError(
            f"Expected a subject whose longer side is {MIN_SIDE_PX} pixels or more, got {width} x "
            f"{height} (width x height) for image {row + 1}. Use a larger image or mask."
        )
    return box


def cut_out_subject(
    image: Tensor, opacity: Tensor | None, long_side: int, row: int = 0
) -> tuple[Tensor, Tensor]:
    """Crop one image to its subject and resize that.

    Args:
        image: (height, width, 1, 3 or 4 channels), float, in [0, 1]; a 4th channel is not read.
        opacity: One row of ``subject_opacity``, (height, width); ``None``: all is subject.
        long_side: Longer side of the result, pixels.
        row: Index of the image in the batch, for messages.

    Returns:
        Colour times opacity, (new height, new width, 1 or 3), and opacity, (new height, new
        width); float32 in [0, 1].

    Raises:
        InputError: The subject is too small, see ``subject_box``.
    """
    if opacity is not None:
        box = subject_box(opacity, row)
        image, opacity = image[box], opacity[box]
    factor = long_side / max(image.shape[:2])
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    colour = image[..., :3].float().clamp(0, 1)
    if opacity is None:
        subject = colour.new_ones((height, width))
    else:
        colour = colour * opacity[..., None]  # else the old background bleeds into the edges
        subject = _snap(resize_smoothly(opacity[None, None], height, width)[0, 0])
    colour = resize_smoothly(colour.permute(2, 0, 1)[None], height, width)[0].permute(1, 2, 0)
    return torch.minimum(_snap(colour), subject[..., None]), subject


def resize_smoothly(values: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize without aliasing.

    Args:
        values: (batch, channels, old height, old width), float.
        height: New height.
        width: New width.
        mode: ``bicubic``, which overshoots [0, 1] at edges, or ``bilinear``, which does not.

    Returns:
        (batch, channels, ``height``, ``width``); ``values`` itself where the size is the same.
    """
    if values.shape[-2:] == (height, width):
        return values
    return F.interpolate(
        values, size=(height, width), mode=mode, align_corners=False, antialias=True
    )


def _check_range(values: Tensor, name: str) -> None:
    """Refuse NaN, infinities and values far outside [0, 1]."""
    low, high = (float(value) for value in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(
            f"Expected finite values in the {name}, got NaN or infinity. "
            f"Look at the step that made the {name}; a half-precision overflow is the usual cause."
        )
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise InputError(
            f"Expected values in [0, 1] in the {name}, got {low:.4g} ... {high:.4g}. "
            f"Rescale the {name}; divide by 255 if it holds bytes."
        )


def _describe(value: object) -> str:
    """Name what was given: a tensor's shape, or a type."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _snap(values: Tensor) -> Tensor:
    """Clamp to [0, 1]; make what is 0 or 1 but for the rounding of the filter's weights exact."""
    values = torch.where(values < 1e-6, 0.0, values)
    return torch.where(values > 1 - 1e-6, 1.0, values)
