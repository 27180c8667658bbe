"""One pass over a reference inside ComfyUI's own sampling machinery."""

import logging
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscrete
from torch import Tensor

from ...dreamcache_core import InputError, ReferenceCache, UnsupportedModelError, capture_features
from ...dreamcache_core.method.capture import cache_from_features
from .model import model_layout, remove_references

logger = logging.getLogger(__name__)

NOT_PLAIN = {
    "area",
    "mask",
    "start_percent",
    "end_percent",
    "control",
    "hooks",
    "gligen",
    "model_conds",
}
"""Entries of a conditioning that make it act on a part of the image or the run only."""


def encode_reference(
    model: ModelPatcher,
    latent: Tensor,
    conditioning: list[Any],
    *,
    seed: int,
    timestep: int,
    mask: Tensor | None,
    node_id: str | None = None,
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
        node_id: Node to show the progress at.

    Returns:
        The cache, on the CPU.

    Raises:
        InputError: VAE and model do not belong together, the conditioning is more than one plain text, or the features
            are not finite.
        UnsupportedModelError: The model is no U-Net of Stable Diffusion's kind.
    """
    _check_conditioning(conditioning)
    layout = model_layout(model)
    clean = clean_clone(model)
    sampling = clean.get_model_object("model_sampling")
    if not isinstance(sampling, ModelSamplingDiscrete):
        raise UnsupportedModelError(
            f"DreamCache needs a model with Stable Diffusion's 1000 discrete timesteps; this one has "
            f"{type(sampling).__name__}. Load a Stable Diffusion 1.x, 2.x or SDXL model."
        )
    channels = model.model.latent_format.latent_channels
    if latent.shape[1] != channels:
        raise InputError(
            f"The model takes latents of {channels} channels, the VAE gave {latent.shape[1]}. Connect the VAE of this "
            "model."
        )
    sigma = sampling.sigma(torch.tensor([float(timestep)]))
    guider = comfy.samplers.CFGGuider(clean)
    guider.inner_set_conds({"positive": conditioning})
    noise = torch.randn(
        (1, *latent.shape[1:]), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
    progress = comfy.utils.ProgressBar(latent.shape[0], node_id=node_id)
    passes: list[dict[str, Tensor]] = []
    for image in latent.split(1):
        sampler = _CaptureSampler()
        sigmas = torch.cat([sigma, torch.zeros(1)])
        guider.sample(noise, image, sampler, sigmas, disable_pbar=True, seed=seed)
        passes.append(sampler.features)
        progress.update(1)
    return cache_from_features(
        passes, layout.context_width, tuple(latent.shape[-2:]), timestep, seed, mask
    )


def clean_clone(model: ModelPatcher, *, keep_sampling: bool = False) -> ModelPatcher:
    """Clone a MODEL without anything that changes a forward pass, except its weights.

    Args:
        model: The MODEL, left as it is.
        keep_sampling: Keep what a ModelSamplingDiscrete node, say, put in place of the model's own noise levels.

    Returns:
        A clone that shares the weights, LoRAs included; without patches, wrappers and references.
    """
    clone = model.clone()
    remove_references(clone)
    clone.model_options = {"transformer_options": {}}
    clone.wrappers, clone.callbacks = {}, {}
    if not clone.is_injected:
        clone.injections = {}
    # another sampling (LCM, say) has other sigmas; a compiled U-Net ignores hooks
    for name in list(clone.object_patches):
        is_sampling = name == "model_sampling" and not keep_sampling
        if is_sampling or name.startswith("diffusion_model"):
            clone.object_patches.pop(name)
    return clone


def plain_text(
    conditioning: list[Any], encoded: str = "the reference is", source: str = "The CLIP"
) -> list[Any]:
    """Reduce what a CLIP returns to one text without hooks and schedule, and say so where there were any.

    Args:
        conditioning: A CLIP's own CONDITIONING of one text; one that carries hooks returns several scheduled ones.
        encoded: What is encoded without them, with its verb, for the warning.
        source: Where the text comes from, for the warning.

    Returns:
        A CONDITIONING of its first text.
    """
    text, options = conditioning[0]
    special = sorted(set(options) & NOT_PLAIN)
    if special or len(conditioning) > 1:
        logger.warning(
            "%s adds %s to its texts; %s encoded without.",
            source,
            ", ".join(special) or "a schedule",
            encoded,
        )
    return [[text, {key: value for key, value in options.items() if key not in NOT_PLAIN}]]


def _check_conditioning(conditioning: list[Any]) -> None:
    special = set(conditioning[0][1]) & NOT_PLAIN if conditioning else set()
    if len(conditioning) != 1 or special:
        raise InputError(
            f"Encode Reference takes one plain text as conditioning; given {len(conditioning)} texts"
            f"{', with ' + ', '.join(sorted(special)) if special else ''}. Connect the output of a CLIP Text Encode, or "
            "leave conditioning unconnected."
        )


class _CaptureSampler(comfy.samplers.Sampler):
    """A sampler of one step that keeps the features instead of the result."""

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,  # noqa: ARG002 - ComfyUI's signature
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Any = None,  # noqa: ARG002
        disable_pbar: bool = False,  # noqa: ARG002
    ) -> Tensor:
        """Noise the latent to the first sigma, run the U-Net up to the last cached layer, return the latent."""
        sampling = model_wrap.inner_model.model_sampling
        noised = sampling.noise_scaling(sigmas[:1], noise, latent_image, False)
        unet = model_wrap.inner_model.diffusion_model
        with capture_features(unet, stop_early=True) as features:
            model_wrap(noised, sigmas[:1], **extra_args)
        self.features = {name: feature.cpu() for name, feature in features.items()}
        return noised
