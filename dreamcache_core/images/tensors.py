"""Pillow's images to tensors and back; knows no files."""

import torch
from PIL import Image
from torch import Tensor

from ..errors import FileFormatError, InputError


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an image of Pillow.

    Args:
        image: Of mode RGB, RGBA or L, or deep greyscale: I, values 0 ... 65535, or F, 0 ... 1.

    Returns:
        (1, height, width, 3), or 4 channels of RGBA, 1 of L; float32 in [0, 1].

    Raises:
        FileFormatError: Deep greyscale has other values.
    """
    if image.mode in ("I", "F"):
        return _deep_grey_to_tensor(image)[..., None].repeat(1, 1, 1, 3)
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(1, image.height, image.width, -1).float().div_(255)


def tensor_to_image(image: Tensor) -> Image.Image:
    """Convert to an image of Pillow.

    Args:
        image: (1, height, width, 3), any float dtype, in [0, 1]; values outside are clamped.

    Returns:
        Of mode RGB, 8 bits a channel.

    Raises:
        InputError: The tensor is misshapen or not finite.
    """
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[-1] != 3 or not image.numel():
        raise InputError(
            f"Expected one image of (1, height, width, 3), got {tuple(image.shape)}. "
            "Take one image of the batch, channels last."
        )
    if not bool(image.isfinite().all()):
        raise InputError(
            "Expected finite pixel values, got NaN or infinity. Nothing was written; "
            "a half-precision overflow in the decoder is the usual cause: run it in float32."
        )
    return _image_of(image[0].detach().float().cpu().clamp(0, 1).mul(255).round(), "RGB")


def clear_grey(deep: Image.Image, clear: int) -> Image.Image:
    """Convert deep greyscale of which one value is transparent.

    Args:
        deep: Of mode I, values 0 ... 65535.
        clear: The value.

    Returns:
        Of mode RGBA, 8 bits a channel; alpha is 0 or 255.

    Raises:
        FileFormatError: There are other values.
    """
    grey = _deep_grey_to_tensor(deep)[0].mul(255).round()
    values = torch.frombuffer(bytearray(deep.tobytes()), dtype=torch.int32)
    alpha = (values != clear).reshape(grey.shape) * 255.0
    return _image_of(torch.stack((grey, grey, grey, alpha), -1), "RGBA")


def _image_of(values: Tensor, mode: str) -> Image.Image:
    """Convert (height, width, channels), whole numbers in [0, 255], to an image of that mode."""
    data = bytearray(values.numel())
    torch.frombuffer(data, dtype=torch.uint8).copy_(values.flatten())
    return Image.frombytes(mode, (values.shape[1], values.shape[0]), bytes(data))


def _deep_grey_to_tensor(image: Image.Image) -> Tensor:
    """Convert 16-bit or float greyscale -> (1, height, width) in [0, 1]; refuse other ranges."""
    top, dtype = (1, torch.float32) if image.mode == "F" else (65535, torch.int32)
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=dtype)
    if not bool(((values >= 0) & (values <= top)).all()):
        raise FileFormatError(
            f"Expected greyscale values in 0 ... {top}, got {values.min().item()} ... "
            f"{values.max().item()}. Save the image with 8 or 16 bits per channel."
        )
    return (values.float() / top).reshape(1, image.height, image.width)
