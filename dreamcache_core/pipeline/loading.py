"""Load a diffusers pipeline from local files onto a device. Nothing is downloaded; diffusers is imported on first use."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError, InputError, UnsupportedModelError
from ..files.tensor_file import refuse_non_weights
from ..files.texts import read_json
from ..packages import require
from .model_settings import check_settings, check_table_size
from .single_file.known import known_config, missing_tokenizers

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def require_diffusers() -> Any:
    """Import diffusers.

    Returns:
        The module.

    Raises:
        MissingPackageError: diffusers or transformers is not installed.
    """
    with require("diffusers and transformers", "diffusers"):
        import diffusers
        import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    return diffusers


def load_pipeline(
    model: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    scheduler: str = "ddim",
) -> Any:
    """Load a diffusers pipeline to generate with; see ``DreamCachePipeline.from_files``."""
    where = choose_device(device)
    pipeline = load_diffusers_pipeline(model, config=config, dtype=choose_dtype(dtype, where))
    if scheduler == "ddim":
        pipeline.scheduler = require_diffusers().DDIMScheduler.from_config(
            pipeline.scheduler.config,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="leading",
        )
    return pipeline.to(where)


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
    except (RuntimeError, AssertionError) as error:  # torch asserts what it was built with
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used: {reason}. Try auto.") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Find the float type to compute in.

    Args:
        name: A key of ``DTYPES``; ``auto``: float16 on CUDA and XPU devices, else float32.
        device: Where.

    Raises:
        InputError: There is no such float type.
    """
    if name == "auto":
        return torch.float16 if device.type in ("cuda", "xpu") else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype must be auto, {', '.join(DTYPES)}; given {name!r}.")
    return DTYPES[name]


def load_diffusers_pipeline(
    model: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a Stable Diffusion 1.x, 2.x or SDXL pipeline from local files; nothing is downloaded.

    Args:
        model: A diffusers folder, or a single-file checkpoint (``.safetensors``, ``.ckpt``).
        config: For a single file: a local diffusers folder of the same family, of which the configurations and the
            tokenizer are read. Stable Diffusion 1.x and SDXL in safetensors files need none.
        dtype: Float type of the weights.

    Returns:
        A ``StableDiffusionPipeline`` (without safety checker) or ``StableDiffusionXLPipeline``, on the CPU.

    Raises:
        FileFormatError: The files are missing, damaged or something else.
        InputError: A single file without ``config`` that needs one.
        MissingPackageError: diffusers is not installed.
        UnsupportedModelError: The folder holds a model of another kind.
    """
    path, folder = Path(model), _config_folder(Path(model), config)
    is_sdxl = "tokenizer_2" in _read_model_index(folder)
    check_table_size(folder)
    diffusers = require_diffusers()
    name = "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline"
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if not is_sdxl:
        options |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    try:
        with quiet_loading():
            kind = getattr(diffusers, name)
            if path.is_dir():
                pipeline = kind.from_pretrained(str(path), variant=weights_variant(path), **options)
            else:
                options |= missing_tokenizers(folder, is_sdxl=is_sdxl)
                pipeline = kind.from_single_file(str(path), config=str(folder), **options)
    except Exception as error:  # damaged files make diffusers raise nearly anything
        raise FileFormatError(
            f"{path} could not be loaded as a {name} ({type(error).__name__}: {error}). Check that the files are "
            "complete and that --config, if given, is of the same family."
        ) from error
    check_settings(pipeline, folder)
    # older releases of diffusers do not know the option dtype
    return pipeline if pipeline.unet.dtype == dtype else pipeline.to(dtype)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hold back the libraries' progress bars and remarks; errors still come as exceptions."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    for lib in libraries:
        lib.set_verbosity_error()
        lib.disable_progress_bar()
    try:
        yield
    finally:
        for lib, (verbosity, has_bar) in zip(libraries, before, strict=True):
            lib.set_verbosity(verbosity)
            if has_bar:
                lib.enable_progress_bar()


def weights_variant(folder: Path) -> str | None:
    """Name the variant of a folder that holds half-precision files only.

    Args:
        folder: A diffusers folder with a U-Net.

    Returns:
        ``fp16``, or ``None`` where there are plain files.
    """
    names = {file.name for file in (folder / "unet").glob("diffusion_pytorch_model*")}
    is_plain = any(name.split(".")[1] in ("safetensors", "bin") for name in names)
    return "fp16" if not is_plain and any(".fp16" in name for name in names) else None


def _config_folder(path: Path, config: str | os.PathLike[str] | None) -> Path:
    if path.is_dir():
        if config is not None:
            raise InputError(
                f"--config goes with a single-file checkpoint; {path} is a folder with its own configuration. Leave it out."
            )
        return path
    if not path.exists():
        raise FileFormatError(
            f"There is no model file or folder {path}. Nothing is downloaded: give a local path."
        )
    refuse_non_weights(path)
    if config is None:
        return known_config(path)
    if not Path(config).is_dir():
        raise InputError(f"Expected --config to be a local diffusers folder; there is no {config}.")
    return Path(config)


def _class_name(entry: object) -> object:
    """Return what a part is: the second of library and class."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _read_model_index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    try:
        index = read_json(file)
        unet, tokenizer = (_class_name(index.get(part)) for part in ("unet", "tokenizer"))
    except FileFormatError as error:
        raise FileFormatError(
            f"{folder} is not a diffusers folder: no valid model_index.json in it. {error} Give the folder that holds "
            "unet, vae, text_encoder, tokenizer and scheduler."
        ) from error
    if unet != "UNet2DConditionModel" or tokenizer is None:
        raise UnsupportedModelError(
            f"DreamCache works on Stable Diffusion 1.x, 2.x and SDXL; {folder} holds a {index.get('_class_name')}."
        )
    return index


NEEDS_MORE = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Settings of a U-Net that takes inputs besides latent, timestep and text."""


def is_sdxl(pipeline: Any) -> bool:
    """Tell SDXL from SD; refuse everything else.

    Args:
        pipeline: A loaded diffusers pipeline.

    Returns:
        Whether it is a ``StableDiffusionXLPipeline``.

    Raises:
        MissingPackageError: diffusers or transformers is not installed.
        UnsupportedModelError: It is no plain text-to-image pipeline of Stable Diffusion 1.x, 2.x or SDXL.
    """
    diffusers, name = require_diffusers(), type(pipeline).__name__
    is_xl = isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
    if not is_xl and not isinstance(pipeline, diffusers.StableDiffusionPipeline):
        raise UnsupportedModelError(
            f"Expected a StableDiffusionPipeline or StableDiffusionXLPipeline, given a {name}: what else it does would be left "
            "out. If it is one of Stable Diffusion's, make a plain one of its parts: StableDiffusionPipeline.from_pipe(pipeline)."
        )
    _require_parts(pipeline, is_xl)
    config = pipeline.unet.config
    has_added = getattr(config, "addition_embed_type", None)
    more = [setting for setting in NEEDS_MORE if getattr(config, setting, None) is not None]
    is_plain = config.in_channels == pipeline.vae.config.latent_channels and not more
    if has_added != ("text_time" if is_xl else None) or not is_plain:
        raise UnsupportedModelError(
            f"Expected a plain text-to-image Stable Diffusion 1.x, 2.x or SDXL pipeline; the U-Net of this {name} takes other "
            f"inputs{f' ({more[0]})' if more else ''}, as inpainting, instruction, class-conditional and guidance-distilled models "
            "do, and any with an IP-Adapter. Load a plain model; take an IP-Adapter out by pipeline.unload_ip_adapter()."
        )
    return is_xl


def _require_parts(pipeline: Any, is_xl: bool) -> None:
    parts = ["unet", "vae", "scheduler", "tokenizer", "text_encoder"]
    parts += ["tokenizer_2", "text_encoder_2"] if is_xl else []
    missing = [part for part in parts if getattr(pipeline, part) is None]
    if missing:
        raise UnsupportedModelError(
            f"Expected a {type(pipeline).__name__} with all its models; this one lacks {', '.join(missing)}. Load it without "
            "setting them to None; SDXL's refiner, which has one text encoder, is not supported."
        )
    noise_levels(pipeline.scheduler)


def noise_levels(scheduler: Any) -> Tensor:
    """Cumulated signal power at every training index, as a scheduler of diffusers keeps it.

    Raises:
        UnsupportedModelError: It has no table of noise levels (flow matching), or its steps take more than others'.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise UnsupportedModelError(
            f"Expected a scheduler with alphas_cumprod; {type(scheduler).__name__} has none. Use one of Stable Diffusion's, "
            "DDIMScheduler say."
        )
    takes = inspect.signature(scheduler.step).parameters.values()
    needed = [
        each.name
        for each in takes
        if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    ]
    if needed != ["model_output", "timestep", "sample"]:
        raise UnsupportedModelError(
            f"Expected a scheduler that takes a prediction, a timestep and a sample; {type(scheduler).__name__} takes "
            f"{', '.join(needed)}. Use one of Stable Diffusion's, DDIMScheduler say."
        )
    return alphas
