"""Images of a subject from options: load a model, sample, and say how an image was made."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Config
from ..errors import InputError
from ..fitting.fit import NUM_PASSES
from ..images.reference import check_placement
from ..method.adapter import AdapterSet
from ..method.blending import ReferenceUse
from ..method.guidance import Guidance, GuidanceMode
from ..version import __version__
from .fingerprint import FINGERPRINT, UNET_PARTS, model_fingerprint
from .fitting import adapters_from_model
from .loading import load_pipeline, require_diffusers
from .pipeline import DreamCachePipeline

logger = logging.getLogger(__name__)

MAX_STEPS = 1000
"""Training timesteps of Stable Diffusion; a sampler cannot take more steps."""

METADATA_KEY = "dreamcache"
"""Key of the PNG text chunk that holds all parameters as JSON."""


@dataclass(frozen=True)
class GenerateOptions(Config):
    """Generate images of a subject.

    Attributes:
        model: Diffusers folder or single-file checkpoint, local.
        reference: Images of the subject; the flag may be repeated.
        prompt: What to show.
        out: Folder for the images.
        adapters: Adapter file (.safetensors or released .pt); without one, adapters are fitted to the
            model.
        config: For a single file not of Stable Diffusion 1.x or SDXL: a local diffusers folder like it.
        mask: Mask of each reference, white = subject; without it, the image's alpha channel.
        negative: What to avoid.
        image_guidance: Pull of the reference; 1 is fastest.
        cfg: Pull of the prompt; 1 = off.
        steps: Sampling steps.
        seed: Seed of the first image; the next adds 1.
        count: Number of images.
        size: Side in pixels of reference and images; else the model's.
        fill: Share of the side the subject takes.
        guidance: How prompt and reference pull; joint: as one.
        image_range: Part of the run in which image_guidance holds; outside it is 1, which is
            faster.
        scale: Strength of the adapters; 0 = plain model.
        scheduler: Sampler; ddim: as in the paper.
        device: Device of the model: auto, cpu, cuda, cuda:1, mps, ...
        dtype: Float type of the model; auto: float16 on a GPU, else float32.
    """

    model: str
    reference: Sequence[str]
    prompt: str
    out: str
    adapters: str | None = None
    config: str | None = None
    mask: Sequence[str] = ()
    negative: str = ""
    image_guidance: float = 1.0
    cfg: float = 7.5
    steps: int = 50
    seed: int = 0
    count: int = 1
    size: int | None = None
    fill: float = 0.85
    guidance: GuidanceMode = "separate"
    image_range: tuple[float, float] = (0.0, 1.0)
    scale: float = 1.0
    scheduler: Literal["ddim", "model"] = "ddim"
    device: str = "auto"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            InputError: A number is out of range, or masks and references differ in number.
        """
        Guidance(self.image_guidance, self.guidance, self.image_range)
        if not math.isfinite(self.cfg) or not math.isfinite(self.scale):
            raise InputError(
                f"--cfg and --scale must be finite; given {self.cfg} and {self.scale}."
            )
        if not 1 <= self.steps <= MAX_STEPS or self.count < 1:
            raise InputError(
                f"--steps must be in 1 ... {MAX_STEPS} and --count at least 1; given {self.steps} and {self.count}."
            )
        check_placement(512 if self.size is None else self.size, self.fill)
        if not 0 <= self.seed <= 2**64 - self.count:
            raise InputError(
                f"--seed must be in 0 ... 2^64 - 1, also for the last image; given {self.seed}."
            )
        if not self.reference:
            raise InputError("Expected an image after --reference; given none.")
        if self.mask and len(self.mask) != len(self.reference):
            raise InputError(
                f"Give --mask once for every --reference, in the same order, or not at all; given {len(self.mask)} "
                f"masks and {len(self.reference)} references."
            )

    def parameters(self, size: int, versions: Mapping[str, str]) -> dict[str, Any]:
        """Return what an image's text chunk tells: files by name only, so that no folder is given away."""
        values: dict[str, Any] = {**self.to_dict(), "size": size, "versions": dict(versions)}
        for key in ("model", "adapters", "config"):
            values[key] = values[key] and Path(values[key]).resolve().name
        values["reference"] = [Path(name).name for name in self.reference]
        values["mask"] = [Path(name).name for name in self.mask]
        del values["out"], values["count"]
        return values


def make_folder(out: Path) -> None:
    """Make a target folder.

    Raises:
        InputError: It cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot write to {out}: {error.strerror}. Give --out a folder of your own."
        ) from error


def open_pipeline(options: GenerateOptions) -> DreamCachePipeline:
    """Load model and adapters, or fit adapters to the model; see ``DreamCachePipeline.from_files``."""
    loading: dict[str, Any] = {
        "config": options.config,
        "device": options.device,
        "dtype": options.dtype,
        "scheduler": options.scheduler,
    }
    if options.adapters is not None:
        return DreamCachePipeline.from_files(options.model, options.adapters, **loading)
    pipeline = DreamCachePipeline(load_pipeline(options.model, **loading))
    logger.info(
        "No adapter file was given: adapters are fitted to the model, not trained. dreamcache fit keeps them in a file."
    )
    pipeline.adapters = fit_to_model(pipeline, options.model)
    return pipeline


def fit_to_model(pipeline: DreamCachePipeline, model: str, **settings: Any) -> AdapterSet:
    """Fit adapters with a progress bar.

    Args:
        pipeline: The model, loaded.
        model: Its file or folder.
        settings: Of ``adapters_from_model``.

    Returns:
        The adapters, marked with the model's name and fingerprint.
    """
    with tqdm(total=NUM_PASSES, desc="fitting", unit="pass") as bar:
        adapters = adapters_from_model(pipeline, on_pass=bar.update, **settings)
    adapters.info = replace(
        adapters.info,
        base_model=Path(model).resolve().name,
        extra={**adapters.info.extra, FINGERPRINT: model_fingerprint(model, UNET_PARTS)},
    )
    return adapters


def sample_image(
    pipeline: DreamCachePipeline,
    use: ReferenceUse,
    options: GenerateOptions,
    seed: int,
    size: int,
    bar: Any,
) -> Tensor:
    """Generate one image.

    Args:
        pipeline: The model.
        use: The reference.
        options: Prompts, guidance and steps.
        seed: Seed of the noise; the one in ``options`` is that of the first image.
        size: Side of the image, pixels.
        bar: tqdm's progress bar; goes on by ``options.steps``.

    Returns:
        (1, ``size``, ``size``, 3), float32 in [0, 1], on the CPU.
    """
    done = 0

    def advance(step: int, timestep: int, latents: Tensor) -> None:  # noqa: ARG001
        nonlocal done
        share = (step + 1) / len(pipeline.pipeline.scheduler.timesteps)
        bar.update(round(share * options.steps) - done)
        done = round(share * options.steps)

    image = pipeline(
        options.prompt,
        use,
        negative_prompt=options.negative,
        guidance_scale=options.cfg,
        image_guidance_scale=options.image_guidance,
        num_inference_steps=options.steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        guidance=options.guidance,
        image_range=options.image_range,
        height=size,
        width=size,
        callback=advance,
        output_type="pt",
    )
    return image.permute(0, 2, 3, 1).float().cpu()


def versions() -> dict[str, str]:
    """Return the versions that decide an image, by package."""
    return {
        "dreamcache": __version__,
        "torch": str(torch.__version__),
        "diffusers": str(require_diffusers().__version__),
    }
