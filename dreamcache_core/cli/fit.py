"""``dreamcache fit``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import Config, check_range
from ..method.adapter_files import save_adapters
from ..names import printable
from ..pipeline.generate import fit_to_model
from ..pipeline.loading import load_pipeline
from ..pipeline.pipeline import DreamCachePipeline
from .convert import check_target


@dataclass(frozen=True)
class FitOptions(Config):
    """Fit adapters to a model, without training.

    Attributes:
        model: Diffusers folder or single-file checkpoint, local.
        out: The .safetensors file to write.
        config: For a single file not of Stable Diffusion 1.x or SDXL: a local diffusers folder like it.
        size: Side in pixels of the images that the model draws for it; else the model's own.
        seed: Decides these images.
        device: Device of the model: auto, cpu, cuda, cuda:1, mps, ...
        dtype: Float type of the model; auto: float16 on a GPU, else float32.
        force: Replace the file if it exists.
    """

    model: str
    out: str
    config: str | None = None
    size: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: One is out of range.
        """
        check_range("seed", self.seed, 0, 2**64 - 1)


def run(options: FitOptions) -> None:
    """Fit adapters and write them.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
    """
    target = Path(options.out)
    check_target(target, options.force)
    loaded = load_pipeline(
        options.model,
        config=options.config,
        device=options.device,
        dtype=options.dtype,
        scheduler="ddim",
    )
    adapters = fit_to_model(
        DreamCachePipeline(loaded), options.model, size=options.size, seed=options.seed
    )
    save_adapters(adapters, target)
    print(printable(str(target)))
