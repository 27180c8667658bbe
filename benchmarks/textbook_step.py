"""One guided step as METHOD.md sections 4 and 5 read, in the obvious lines: what the product is measured against.

Keys and values are projected at every step, no matrices are folded, and the reference-free prediction is a call of its
own. Nothing here comes from ``dreamcache_core``, so that agreement in value means something.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .textbook import CACHED_LAYERS, TextbookAdapter, in_place_of_self_attention


class TextbookStep:
    """Three predictions, combined.

    Args:
        unet: diffusers' U-Net of Stable Diffusion 1 or 2.
        adapters: Adapter by ldm layer name.
        features: Cached features by ldm layer name, (references, channels, height, width).
    """

    def __init__(
        self, unet: Any, adapters: Mapping[str, TextbookAdapter], features: Mapping[str, Tensor]
    ) -> None:
        self.unet, self.adapters = unet, adapters
        # tokens of several images of one subject side by side
        self.tokens = {
            layer: maps.flatten(2).transpose(1, 2).flatten(0, 1)[None]
            for layer, maps in features.items()
        }

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        timestep: int,
        negative: Tensor,
        prompt: Tensor,
        *,
        guidance_scale: float,
        image_guidance_scale: float,
    ) -> Tensor:
        """Predict.

        Args:
            latents: (images, channels, height, width).
            timestep: Training index.
            negative: Text states of the negative prompt, (images, tokens, width).
            prompt: Text states of the prompt, likewise.
            guidance_scale: s_text.
            image_guidance_scale: s_image.

        Returns:
            Shape of ``latents``.
        """
        without = self.unet(latents, timestep, negative).sample
        with ExitStack() as stack:
            for name, layer in CACHED_LAYERS.items():
                block = self.unet.get_submodule(name).transformer_blocks[0]
                adapter, tokens = self.adapters[layer], self.tokens[layer]
                rows = tokens.expand(2 * len(latents), -1, -1)
                stack.enter_context(in_place_of_self_attention(block, adapter, rows))
            both = self.unet(latents.repeat(2, 1, 1, 1), timestep, torch.cat([negative, prompt]))
        reference, text = both.sample.chunk(2)
        return (
            without
            + guidance_scale * (text - reference)
            + image_guidance_scale * (reference - without)
        )
