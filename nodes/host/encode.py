"""One pass over a reference for each of its images."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscrete
from comfy.patcher_extension import WrappersMP, add_wrapper
from torch import Tensor

from ...dreamcache_core import (
    AdapterSet,
    InputError,
    ReferenceCache,
    UnsupportedModelError,
    capture_features,
)
from ...dreamcache_core.method.capture import cache_from_features
from .model import check_channels, model_layout, require_model_fit
from .sampling import NOT_PLAIN, LoadedModel, clean_clone, inside_sampling


def encode_reference(
    model: ModelPatcher,
    latent: Tensor,
    conditioning: list[Any],
    *,
    seed: int,
    timestep: int,
    mask: Tensor | None,
    adapters: AdapterSet | None = None,
    progress: comfy.utils.ProgressBar | None = None,
) -> ReferenceCache:
    """Cache images of a subject, each by its own forward pass.

    Source: METHOD.md section 3.

    Args:
        model: The MODEL, as it will generate (LoRA included); patches of other packs and DreamCache are left out.
        latent: Latents of the images as the VAE gives them, unscaled, (references, channels, height, width).
        conditioning: Text of the pass; the empty prompt in the paper.
        seed: Seed of the noise; the same for each image. The global random state is left alone.
        timestep: Training index of the pass, 0 to 999; 1 in the paper.
        mask: The subject, (references, height, width) in [0, 1], or ``None`` for the whole image.
        adapters: Those that it is for: they decide about layers and timestep; ``None``: METHOD.md's layers.
        progress: Goes on by one for each image.

    Returns:
        The cache, on the CPU.

    Raises:
        InputError: VAE and model do not belong together, the conditioning is more than one plain text, or the features
            are not finite.
        MismatchError: The adapters were made for another model.
        UnsupportedModelError: The model is no U-Net of Stable Diffusion's kind.
    """
    _check_conditioning(conditioning)
    layers = None
    if adapters is not None:
        require_model_fit(model, adapters.info.layout)
        layers, timestep = adapters.layers, adapters.info.timestep
    clean = clean_clone(model)
    sampling = clean.get_model_object("model_sampling")
    if not isinstance(sampling, ModelSamplingDiscrete):
        raise UnsupportedModelError(
            f"DreamCache needs a model with Stable Diffusion's 1000 discrete timesteps; this one has "
            f"{type(sampling).__name__}. Load a Stable Diffusion 1.x, 2.x or SDXL model."
        )
    check_channels(latent, model.model.latent_format.latent_channels)
    sigma = sampling.sigma(torch.tensor([float(timestep)]))
    noise = torch.randn(
        (1, *latent.shape[1:]), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
    passes: list[dict[str, Tensor]] = []
    for image in latent.split(1):
        features = inside_sampling(
            clean,
            conditioning,
            image,
            partial(_capture, layers=layers),
            noise=noise,
            sigma=sigma,
            seed=seed,
        )
        passes.append(features)
        if progress is not None:
            progress.update(1)
    return cache_from_features(
        passes, model_layout(model).context_width, tuple(latent.shape[-2:]), timestep, seed, mask
    )


def kept_on_disk(reference: ReferenceCache) -> ReferenceCache:
    """Put a reference into a file of ComfyUI's temporary folder and map it: memory holds only what is in use.

    Args:
        reference: One of many, which together may not fit into memory.

    Returns:
        An equal one.

    Raises:
        InputError: The file cannot be written.
    """
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"dreamcache-{uuid4().hex}.safetensors"
    reference.save(path)
    return ReferenceCache.load(path, mapped=True)


def _capture(loaded: LoadedModel, layers: Sequence[str] | None) -> dict[str, Tensor]:
    """Run the U-Net up to the last cached layer."""
    captured: dict[str, Tensor] = {}

    def read(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # the pass ends here, and not in one of ComfyUI's frames, which may be a worker thread's
        unet = executor.class_obj.diffusion_model
        with capture_features(unet, layers, stop_early=True) as features:
            executor(x, *args, **kwargs)
        captured.update(features)
        return x

    add_wrapper(WrappersMP.APPLY_MODEL, read, loaded.transformer_options)
    loaded.predict()
    return {name: feature.cpu() for name, feature in captured.items()}


def _check_conditioning(conditioning: list[Any]) -> None:
    special = set(conditioning[0][1]) & NOT_PLAIN if conditioning else set()
    if len(conditioning) != 1 or special:
        raise InputError(
            f"Encode Reference takes one plain text as conditioning; given {len(conditioning)} texts"
            f"{', with ' + ', '.join(sorted(special)) if special else ''}. Connect the output of a CLIP Text Encode, or "
            "leave conditioning unconnected."
        )
