"""Node that shows where a new image looks in its reference."""

from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..dreamcache_core import InputError
from ..dreamcache_core.images.masks import given_mask, on_white
from ..dreamcache_core.images.reference import fit_mask
from ..dreamcache_core.method.attention_maps import (
    AttentionMaps,
    attention_maps,
    draw_attention,
    record_hidden_states,
)
from ..dreamcache_core.method.cache import LATENT_FACTOR
from .host.applied import Applied, AppliedUse, require_applied
from .host.run import RunStore
from .host.sampling import LoadedModel, inside_sampling, plain_text
from .host.unet.patches import prepare_use
from .sockets import SUBJECT, advanced, found_by

NOWHERE = -1.0
NAME = "DreamCache Attention Map"


class AttentionMap(io.ComfyNode):
    """Show where a new image looks in its reference, and from where."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheAttentionMap",
            display_name=NAME,
            category="DreamCache/advanced",
            description="Shows where a new image looks in its reference: the reference, lit where it is looked at, and beside it "
            "what each place of the new image sees there. A region or a point asks about a part of the new image.",
            **found_by("heatmap", "why", *SUBJECT),
            inputs=[
                io.Model.Input("model", tooltip="From Apply DreamCache."),
                io.Conditioning.Input("positive", tooltip="The prompt of the new image."),
                io.Latent.Input("latent", tooltip="The new image, from the sampler."),
                io.Image.Input(
                    "reference_image",
                    tooltip="The image that went into Encode Reference; all of them for a combined reference.",
                ),
                io.Float.Input(
                    "percent",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Progress of the run to look at: early steps lay out the image, late ones draw details.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Part of the new image to ask about, of its aspect; all of it if not connected.",
                ),
                _place("point_x", "from the left, 1 is the right edge"),
                _place("point_y", "from the top, 1 is the bottom edge"),
                advanced(
                    io.Int.Input(
                        "reference_number",
                        default=1,
                        min=1,
                        max=64,
                        optional=True,
                        tooltip="With several Apply DreamCache: whose reference, counted from the checkpoint loader on.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The reference, lit where it is looked at; beside it what the new image sees.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        latent: dict[str, Any],
        reference_image: Tensor,
        percent: float,
        mask: Tensor | None = None,
        point_x: float = NOWHERE,
        point_y: float = NOWHERE,
        reference_number: int = 1,
    ) -> io.NodeOutput:
        """Run one step of the model and draw its attention."""
        applied = require_applied(model, NAME)
        chosen = _choose(applied, reference_number)
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        region = _region(mask, (point_x, point_y), samples)
        images = on_white(reference_image)
        sampling = model.get_model_object("model_sampling")
        sigma = min(sampling.percent_to_sigma(percent), float(sampling.sigma_max))
        level = torch.tensor([max(sigma, float(sampling.sigma_min))])
        store = RunStore(applied.acting, sampling)
        index = applied.acting.uses.index(chosen)
        if float(level) not in store.ranges[index]:
            raise InputError(
                f"This reference acts from {chosen.start_percent:g} to {chosen.end_percent:g} of the run, so nothing looks at "
                f"it at percent {percent:g}. Choose a percent at which it acts, or change the range in Apply DreamCache."
            )

        def look(loaded: LoadedModel) -> AttentionMaps:
            unet, layers = loaded.base.diffusion_model, chosen.use.adapters.layers
            with record_hidden_states(unet, layers) as states:
                loaded.predict()
            references = prepare_use(index, store, loaded.base, loaded.device)
            return attention_maps(states, references, chosen.use.reference, images, region)

        maps = inside_sampling(
            model,
            plain_text(positive, "the map is", "The prompt"),
            samples,
            look,
            noise=comfy.sample.prepare_noise(samples, 0),
            sigma=level,
            seed=0,
        )
        return io.NodeOutput(draw_attention(maps, images, region))


def _place(name: str, where: str) -> io.Input:
    """Declare one coordinate of a point."""
    return advanced(
        io.Float.Input(
            name,
            default=NOWHERE,
            min=NOWHERE,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip=f"Place in the new image to ask about, {where}; -1: no point.",
        )
    )


def _choose(applied: Applied, number: int) -> AppliedUse:
    if number > len(applied.uses):
        raise InputError(
            f"reference_number is {number}, but the model has {len(applied.uses)} references on it. Give 1 ... "
            f"{len(applied.uses)}."
        )
    chosen = applied.uses[number - 1]
    if not chosen.use.is_active:
        raise InputError(
            "This reference has a strength of 0 or an empty region in Apply DreamCache, so nothing looks at it. Raise the "
            "strength, or paint the region."
        )
    return chosen


def _region(mask: Tensor | None, point: tuple[float, float], samples: Tensor) -> Tensor | None:
    """Places that are asked about: mask and point together, or ``None`` for everywhere."""
    height, width = samples.shape[-2:]
    mask, _ = given_mask(mask)
    if mask is not None:
        mask = fit_mask(mask, len(samples), LATENT_FACTOR * height, LATENT_FACTOR * width)
    if min(point) < 0:
        if max(point) >= 0:
            raise InputError(
                "Only one of point_x and point_y is given. Set both, or leave both at -1."
            )
        return mask
    if mask is not None:
        raise InputError(
            "Both a mask and a point are given. Leave the mask unconnected, or set point_x and point_y to -1."
        )
    spot = torch.zeros(1, height, width)
    row, column = (
        min(int(p * side), side - 1) for p, side in zip(point[::-1], (height, width), strict=True)
    )
    spot[:, row, column] = 1
    return spot


NODES: list[type[io.ComfyNode]] = [AttentionMap]
