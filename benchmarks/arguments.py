"""Arguments that the benchmarks of generation share."""

import argparse
from pathlib import Path

import torch

from dreamcache_core.errors import InputError

from .guided import DTYPES, Settings
from .models import UNETS

LATENTS = {"sd21": 64, "sd15": 64, "sdxl": 128, "small": 24, "tiny": 8}
"""Height and width of the latents that go with each size."""


def positive(text: str) -> int:
    """Read a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, given {text}")
    return number


def add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Declare device, rounds and output.

    Args:
        parser: Where.
        rounds: Default number of timed rounds.
    """
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=positive, default=rounds, help="timed rounds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for JSON and plot")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare size, latents and float type of the model."""
    parser.add_argument("--size", choices=UNETS, default="small", help="size of the U-Net")
    parser.add_argument(
        "--latent", type=positive, help="height and width of the latents; else the size's own"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What the arguments of ``add_common`` and ``add_model`` ask for.

    Raises:
        InputError: The device is not there.
    """
    require_device(arguments.device)
    latent = arguments.latent or LATENTS[arguments.size]
    return Settings(arguments.size, latent, arguments.dtype, arguments.device)


def require_device(device: str) -> None:
    """Refuse a device that torch cannot compute on.

    Raises:
        InputError: It is not there.
    """
    if device != "cuda" or torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        raise InputError(
            f"--device cuda: torch {torch.__version__} is built without CUDA. Install one that has it, or use --device cpu."
        )
    raise InputError("--device cuda: torch finds no CUDA device here. Use --device cpu.")
