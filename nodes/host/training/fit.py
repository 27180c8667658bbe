"""Adapters fitted to a MODEL, as it generates: LoRAs count, patches of other packs do not."""

from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ....dreamcache_core import AdapterSet, InputError
from ....dreamcache_core.fitting.fit import NUM_PASSES
from ....dreamcache_core.method.cache import LATENT_FACTOR
from ..model import model_layout
from ..sampling import LoadedModel, clean_clone, inside_sampling
from .frozen_model import FrozenModel, check_texts, noise_schedule
from .images import encode_texts


def fit_to_model(
    model: ModelPatcher, clip: Any, *, size_px: int, seed: int, node_id: str | None
) -> AdapterSet:
    """Fit adapters, see ``fit_adapters``.

    Args:
        model: The MODEL, left as it is.
        clip: Its CLIP, for the empty prompt.
        size_px: Side of the images that it draws, pixels, a multiple of 8.
        seed: Decides everything; the global random state is left alone.
        node_id: Node to show the progress at.

    Returns:
        The adapters, float32 on the CPU.

    Raises:
        InputError: There is no CLIP, or it is another model's.
        StateError: The model predicts NaN or infinity.
        UnsupportedModelError: The model is no U-Net of Stable Diffusion's kind, or its self-attention was replaced.
    """
    if clip is None:
        raise InputError(
            "Adapters from Model needs clip for the empty prompt; the loader gave none. Connect a CLIP loader with this model's "
            "text encoder."
        )
    clean, layout = clean_clone(model), model_layout(model)
    schedule = noise_schedule(clean)
    texts = encode_texts(clip, [""])
    check_texts(texts, layout)
    channels = model.model.latent_format.latent_channels
    shape = (channels, size_px // LATENT_FACTOR, size_px // LATENT_FACTOR)
    progress = comfy.utils.ProgressBar(NUM_PASSES, node_id=node_id)

    def fit(loaded: LoadedModel) -> AdapterSet:
        base = FrozenModel(loaded, texts, schedule)
        return base.fit(layout, shape, 0, seed=seed, on_pass=lambda: progress.update(1))

    blank = torch.zeros(1, *shape)
    return inside_sampling(clean, texts[0], blank, fit, noise=blank, sigma=torch.ones(1), seed=seed)
