"""ComfyUI's sampling machinery for what is no sampling run: it loads a MODEL, processes its text, can be interrupted."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .wrappers import remove_references

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

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

BYPASS = "comfy.weight_adapter.bypass"
"""Module of the injections that stand for changed weights: LoRAs in bypass mode."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A MODEL as a sampler finds it.

    Attributes:
        base: Its BaseModel, on ``device``.
        device: Where it is loaded.
        transformer_options: The run's.
        predict: Noises the latents to the run's sigma and calls the model once with the run's text.
    """

    base: Any
    device: torch.device
    transformer_options: dict[str, Any]
    predict: Callable[[], Tensor]


def inside_sampling(
    model: ModelPatcher,
    conditioning: list[Any],
    latent: Tensor,
    action: Callable[[LoadedModel], Result],
    *,
    noise: Tensor,
    sigma: Tensor,
    seed: int,
) -> Result:
    """Do something where a sampler would take its steps.

    Args:
        model: The MODEL.
        conditioning: The one text of the run, see ``plain_text``.
        latent: Unscaled latents, (batch, channels, height, width).
        action: What to do.
        noise: Unit noise, same shape.
        sigma: Noise level of the run, (1,).
        seed: Seed of the run, for what other nodes draw.

    Returns:
        What ``action`` returns.
    """
    sampler = _ActionSampler(action)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    sigmas = torch.cat([sigma, torch.zeros(1)])
    guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed)
    return sampler.result


class _ActionSampler(comfy.samplers.Sampler):
    def __init__(self, action: Callable[[LoadedModel], Any]) -> None:
        self.action = action

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
        """Call the action; what is returned counts for nothing."""
        base = model_wrap.inner_model

        def predict() -> Tensor:
            noised = base.model_sampling.noise_scaling(sigmas[:1], noise, latent_image, False)
            return model_wrap(noised, sigmas[:1].expand(len(noised)), **extra_args)

        options = extra_args["model_options"]["transformer_options"]
        self.result = self.action(LoadedModel(base, noise.device, options, predict))
        return noise


def clean_clone(model: ModelPatcher, *, keep_sampling: bool = False) -> ModelPatcher:
    """Clone a MODEL without anything that changes a forward pass, except its weights.

    Args:
        model: The MODEL, left as it is.
        keep_sampling: Keep what a ModelSamplingDiscrete node, say, put in place of the model's own noise levels.

    Returns:
        A clone that shares the weights, LoRAs included; without patches, wrappers, references and copies on other devices.
    """
    clone = model.clone()
    remove_references(clone)
    clone.model_options = {"transformer_options": {}}
    clone.wrappers, clone.callbacks, clone.additional_models = {}, {}, {}
    clone.injections = bypass_loras(clone)
    clone.is_injected = False  # ComfyUI takes the model's injections out before it loads a clone
    # another sampling (LCM, say) has other sigmas; a compiled U-Net ignores hooks
    for name in list(clone.object_patches):
        is_sampling = name == "model_sampling" and not keep_sampling
        if is_sampling or name.startswith("diffusion_model"):
            clone.object_patches.pop(name)
    return clone


def bypass_loras(model: ModelPatcher) -> dict[str, list[Any]]:
    """Of what a MODEL injects into its U-Net, the LoRAs in bypass mode, as ``injections`` has them."""
    return {
        key: loras
        for key, injections in model.injections.items()
        if (loras := [i for i in injections if i.inject.__module__ == BYPASS])
    }


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
