"""Nodes that put references on a model and guide by them."""

import logging
from collections.abc import Iterator
from typing import Any

from comfy.model_sampling import V_PREDICTION
from comfy_api.latest import io
from torch import Tensor

from ..dreamcache_core import AdapterSet, Guidance, ReferenceCache, ReferenceUse
from ..dreamcache_core.images.reference import is_placeholder_mask
from ..dreamcache_core.method.backends import require_fit
from ..dreamcache_core.method.layers import require_same_layout
from .host.gates import gate_conditioning
from .host.model import (
    DreamCacheCFGGuider,
    adapter_patcher,
    apply_reference,
    limit_guidance,
    require_applied,
    unet_of,
)
from .host.report import report
from .host.types import Adapters, Reference

logger = logging.getLogger(__name__)

MAX_GUIDANCE = 20.0


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    """Declare a place in the run."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, tooltip=tooltip)


class Apply(io.ComfyNode):
    """Let the images of a model see a reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheApply",
            display_name="Apply DreamCache",
            category="DreamCache",
            description="Puts the subject of a reference into the images of this model. Works with any sampler node; the "
            "order among other model nodes does not matter. A second Apply adds a second subject.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the reference was encoded with."),
                Adapters.Input(
                    "adapters", tooltip="From Load DreamCache Adapters; trained for this model."
                ),
                Reference.Input("reference", tooltip="From Encode Reference."),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Strength of the adapters. 0 is exactly the plain model, 1 as trained.",
                ),
                io.Float.Input(
                    "image_guidance",
                    default=0.4,
                    min=0.0,
                    max=MAX_GUIDANCE,
                    step=0.05,
                    tooltip="How strongly the result is pulled towards the reference: 0 only through the prompt's own "
                    "prediction, 1 plain and fastest (two predictions a step instead of three), above 1 more likeness "
                    "and less prompt. The sampler's cfg is the text's part. With several Applies the last one holds.",
                ),
                _percent(
                    "start_percent",
                    0.0,
                    "Progress from which on the reference acts: 0 from the first step.",
                ),
                _percent(
                    "end_percent",
                    1.0,
                    "Progress up to which the reference acts: 1 to the last step.",
                ),
                io.Combo.Input(
                    "guidance",
                    options=["separate", "joint"],
                    default="separate",
                    tooltip="separate: text and reference are guided by cfg and image_guidance (three predictions a "
                    "step). joint: both by cfg alone (two), image_guidance has no effect.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Region of the new image in which the subject may appear: 1 acts, 0 is the plain model. "
                    "Without it everywhere.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapters: AdapterSet,
        reference: ReferenceCache,
        scale: float,
        image_guidance: float,
        start_percent: float,
        end_percent: float,
        guidance: str,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        """Put the reference on a clone of the model."""
        layout = adapters.info.layout
        require_fit(unet_of(model), layout, "the adapters")
        require_same_layout(reference.layout, "The reference", layout, "the adapters")
        warnings = list(_doubts(model, adapters, start_percent, end_percent))
        for warning in warnings:
            logger.warning(warning)
        if mask is not None and is_placeholder_mask(mask):
            logger.info(
                "The mask is Load Image's placeholder for an image without alpha: it counts as no mask."
            )
            mask = None
        patcher = adapter_patcher(adapters, model)
        use = ReferenceUse(reference, patcher.model, scale=scale, mask=mask)
        settings = Guidance.from_dict({"image_guidance_scale": image_guidance, "mode": guidance})
        applied = apply_reference(model, use, patcher, settings, start_percent, end_percent)
        number = len(require_applied(applied, "Apply DreamCache").uses)
        text = f"subject {number}: scale {scale:g}, from {start_percent:g} to {end_percent:g} of the run"
        return io.NodeOutput(applied, ui=report(cls, " ".join(warnings) or text))


class Conditioning(io.ComfyNode):
    """Say of one conditioning whether it sees the references."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheConditioning",
            display_name="DreamCache Conditioning",
            category="DreamCache/advanced",
            description="For regional prompts, Perp-Neg and DualCFGGuider: marks which texts see the reference. Needs Apply "
            "DreamCache on the model; a text without a mark sees it.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The text to mark."),
                io.Boolean.Input(
                    "use_reference",
                    default=True,
                    tooltip="On: this text's prediction sees the reference. Off: it is the plain model's.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="The marked text.")
            ],
        )

    @classmethod
    def execute(cls, conditioning: list[Any], use_reference: bool) -> io.NodeOutput:
        """Mark a copy."""
        return io.NodeOutput(gate_conditioning(conditioning, use_reference))


class Guider(io.ComfyNode):
    """Guider for SamplerCustomAdvanced with an image guidance of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheGuider",
            display_name="DreamCache Guider",
            category="DreamCache/advanced",
            description="Guides by text (cfg) and by reference (image_guidance), each with its own strength. For "
            "SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("model", tooltip="From Apply DreamCache."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Text guidance: 1 is off, 7.5 is usual.",
                ),
                io.Float.Input(
                    "image_guidance",
                    default=0.4,
                    min=0.0,
                    max=MAX_GUIDANCE,
                    step=0.05,
                    tooltip="Pull towards the reference, in place of the one set in Apply DreamCache: 1 is plain and "
                    "fastest, above 1 more likeness and less prompt.",
                ),
                io.Conditioning.Input(
                    "unconditional",
                    optional=True,
                    tooltip="Text of the prediction without the reference; the negative if not connected. No effect at "
                    "image_guidance 1.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list[Any],
        negative: list[Any],
        cfg: float,
        image_guidance: float,
        unconditional: list[Any] | None = None,
    ) -> io.NodeOutput:
        """Make the guider."""
        guider = DreamCacheCFGGuider(model)
        guider.set_dreamcache(positive, negative, unconditional, image_guidance)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


class GuidanceRange(io.ComfyNode):
    """Let image guidance hold for a part of the run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheGuidanceRange",
            display_name="DreamCache Guidance Range",
            category="DreamCache/advanced",
            description="Saves time: image_guidance holds for a part of the run only; in the rest it counts as 1, and a step "
            "needs two predictions instead of three. The reference itself acts throughout.",
            inputs=[
                io.Model.Input("model", tooltip="From Apply DreamCache."),
                _percent(
                    "start_percent",
                    0.0,
                    "Progress from which on image_guidance holds: 0 from the first step.",
                ),
                _percent(
                    "end_percent",
                    0.5,
                    "Progress up to which image_guidance holds: 1 to the last step, which saves nothing.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="For the sampler or DreamCache Guider."
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, start_percent: float, end_percent: float) -> io.NodeOutput:
        """Set the range on a clone."""
        return io.NodeOutput(limit_guidance(model, start_percent, end_percent))


def _doubts(
    model: Any, adapters: AdapterSet, start_percent: float, end_percent: float
) -> Iterator[str]:
    """What is allowed, but hardly meant."""
    is_v = isinstance(model.get_model_object("model_sampling"), V_PREDICTION)
    predicts = "v_prediction" if is_v else "epsilon"
    if predicts != adapters.info.prediction:
        advice = "Use the model that they were trained for."
        if adapters.family == "sd21":
            advice = "They belong to Stable Diffusion 2.1-base (512 px, v2-1_512-ema-pruned), not to the 768-v checkpoint."
        yield (
            f"These adapters were trained for a model with {adapters.info.prediction} prediction, this model has "
            f"{predicts}: expect a poor likeness. {advice}"
        )
    if start_percent >= end_percent:
        yield (
            f"Apply DreamCache acts from {start_percent} to {end_percent} of the run, which is never: the images will be "
            "the plain model's."
        )


NODES: list[type[io.ComfyNode]] = [Apply, Conditioning, Guider, GuidanceRange]
