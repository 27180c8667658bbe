"""``dreamcache generate``: check everything, sample, and write the images with their parameters."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import Config
from ..errors import InputError
from ..images.files import contact_sheet, read_image, read_mask, save_png
from ..images.reference import check_mask_aspect, check_placement, prepare_reference_image
from ..method.adapter import AdapterSet
from ..method.adapter_files import load_adapters
from ..method.backends import require_fit
from ..method.blending import ReferenceUse
from ..method.guidance import Guidance, GuidanceMode
from ..version import __version__
from .loading import load_diffusers_pipeline, require_diffusers
from .pipeline import DreamCachePipeline

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_STEPS = 1000
"""Training timesteps of Stable Diffusion; a sampler cannot take more steps."""

METADATA_KEY = "dreamcache"
"""Key of the PNG text chunk that holds all parameters as JSON."""

SHEET_COLUMNS = 4


@dataclass(frozen=True)
class GenerateOptions(Config):
    """What ``dreamcache generate`` was asked for; the parser explains the fields."""

    model: str
    adapters: str
    reference: Sequence[str]
    prompt: str
    out: str
    config: str | None = None
    mask: Sequence[str] = ()
    negative: str = ""
    image_guidance: float = 0.4
    cfg: float = 7.5
    steps: int = 50
    seed: int = 0
    count: int = 1
    size: int | None = None
    fill: float = 0.85
    guidance: GuidanceMode = "separate"
    image_range: Sequence[float] = (0.0, 1.0)
    scale: float = 1.0
    scheduler: str = "ddim"
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            InputError: A number is out of range, or masks and references differ in number.
        """
        start, end = self.image_range
        Guidance(self.image_guidance, self.guidance, (start, end))
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


def generate(options: GenerateOptions) -> None:
    """Generate images and write them; nothing is written before everything has been checked.

    Args:
        options: What to do.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
        OSError: A file could not be written.
    """
    out = _check_out(Path(options.out))
    images = _read_references(options)
    adapters = load_adapters(options.adapters)
    pipeline = _load_pipeline(options, adapters)
    size = options.size or min(pipeline.default_size_px)
    prepared = torch.cat(
        [
            prepare_reference_image(image, mask, size=size, fill=options.fill)[0]
            for image, mask in images
        ]
    )
    reference = pipeline.encode_reference(
        prepared, timestep=adapters.info.timestep, layers=adapters.layers
    )
    use = ReferenceUse(reference, adapters, options.scale)
    make_folder(out)
    run = _Run(out, options.parameters(size, _versions()), list(prepared.split(1)))
    with tqdm(total=options.count * options.steps, unit="step", desc="sampling") as bar:
        for seed in range(options.seed, options.seed + options.count):
            image = _sample(pipeline, use, options, seed, size, bar)
            run.add_image(image, seed)
    run.finish()


def _check_out(out: Path) -> Path:
    """Refuse a target folder that could not be made or written to; make nothing yet."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"Cannot write to {out}: {nearest} is {'not writable' if nearest.is_dir() else 'a file'}. Give --out a "
            "folder of your own."
        )
    return out


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


def _read_references(options: GenerateOptions) -> list[tuple[Tensor, Tensor | None]]:
    """Read images (1, height, width, 3) and masks; the alpha channel is the mask where none is given."""
    images: list[tuple[Tensor, Tensor | None]] = []
    bare: list[str] = []
    for index, path in enumerate(options.reference):
        image, alpha = read_image(path)
        mask = read_mask(options.mask[index]) if options.mask else alpha
        if mask is None:
            bare.append(Path(path).name)
        else:
            check_mask_aspect(mask, *image.shape[1:3])
        images.append((image, mask))
    if bare:
        logger.warning(
            "%s: no mask and no transparency, so the background will leak into the images. Give --mask, or a PNG whose "
            "background is transparent.",
            ", ".join(bare),
        )
    return images


def _load_pipeline(options: GenerateOptions, adapters: AdapterSet) -> DreamCachePipeline:
    device = choose_device(options.device)
    dtype = DTYPES.get(options.dtype)
    if dtype is None:
        dtype = torch.float16 if device.type in ("cuda", "xpu") else torch.float32
    model = load_diffusers_pipeline(options.model, config=options.config, dtype=dtype)
    require_fit(model.unet, adapters.info.layout, "the adapters")
    if options.scheduler == "ddim":  # METHOD.md section 5: DDIM, eta 0
        model.scheduler = require_diffusers().DDIMScheduler.from_config(
            model.scheduler.config,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="leading",
        )
    return DreamCachePipeline(model.to(device))


def choose_device(name: str) -> torch.device:
    """Find what to compute on.

    Args:
        name: ``cuda``, ``cuda:1``, ``cpu``, ...; ``auto``: an accelerator where there is one.

    Raises:
        InputError: There is no such device, or it cannot be used.
    """
    if name == "auto":
        for kind in ("cuda", "xpu", "mps"):
            backend = getattr(torch, kind, None)
            if backend is not None and backend.is_available():
                return torch.device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used: {reason}. Try --device auto.") from error
    return device


def _sample(
    pipeline: DreamCachePipeline,
    use: ReferenceUse,
    options: GenerateOptions,
    seed: int,
    size: int,
    bar: Any,
) -> Tensor:
    """Generate one image (1, height, width, 3) in [0, 1]."""
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
        image_range=(options.image_range[0], options.image_range[1]),
        height=size,
        width=size,
        callback=advance,
        output_type="pt",
    )
    return image.permute(0, 2, 3, 1).float().cpu()


def _versions() -> dict[str, str]:
    diffusers = require_diffusers()
    return {
        "dreamcache": __version__,
        "torch": str(torch.__version__),
        "diffusers": str(diffusers.__version__),
    }


class _Run:
    """The files of one run: ``0001_reference.png``, ``0001_seed_7.png``, ..., ``0001_sheet.png``.

    The number is the first free one of the folder, so nothing is overwritten.
    """

    def __init__(
        self, folder: Path, parameters: Mapping[str, Any], references: list[Tensor]
    ) -> None:
        self.folder, self.parameters, self.references = folder, parameters, references
        self.number = _first_free_number(folder)
        self.images: list[tuple[Tensor, int]] = []

    def add_image(self, image: Tensor, seed: int) -> None:
        if not self.images:
            for index, reference in enumerate(self.references, start=1):
                suffix = "" if len(self.references) == 1 else f"_{index}"
                self.write(f"reference{suffix}", reference, {})
        self.images.append((image, seed))
        self.write(f"seed_{seed}", image, {**self.parameters, "seed": seed})

    def finish(self) -> None:
        rows: list[list[Tensor]] = [self.references]
        captions = [["reference"] * len(self.references)]
        for start in range(0, len(self.images), SHEET_COLUMNS):
            chunk = self.images[start : start + SHEET_COLUMNS]
            rows.append([image for image, _ in chunk])
            captions.append([f"seed {seed}" for _, seed in chunk])
        self.write("sheet", contact_sheet(rows, captions), self.parameters)

    def write(self, name: str, image: Tensor, parameters: Mapping[str, Any]) -> None:
        path = self.folder / f"{self.number:04d}_{name}.png"
        save_png(path, image, {METADATA_KEY: json.dumps(parameters)} if parameters else None)
        tqdm.write(str(path))


def _first_free_number(folder: Path) -> int:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    taken = [int(name.split("_")[0]) for name in names if name.split("_")[0].isdecimal()]
    return max(taken, default=0) + 1
