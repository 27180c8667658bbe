"""The node that puts a reference on a model."""

import logging
from collections.abc import Iterator
from typing import Any

from comfy.model_sampling import V_PREDICTION
from comfy_api.latest import io
from torch import Tensor

from ..dreamcache_core import AdapterSet, Guidance, ReferenceCache, ReferenceUse
from ..dreamcache_core.fitting.fit import fitted_to_another
from ..dreamcache_core.images.masks import given_mask
from ..dreamcache_core.method.layers import require_same_layout
from .host.applied import FORMER_DEFAULT, Applied, AppliedUse, applied_to
from .host.model import adapter_patcher, require_model_fit, unet_of
from .host.report import node_id, report
from .host.wrappers import with_references
from .sockets import (
    PERSONALIZE,
    Adapters,
    Reference,
    advanced,
    found_by,
    image_guidance_input,
    percent_input,
)

logger = logging.getLogger(__name__)

MOST_GUIDANCE = 10.0
"""Image guidance beyond which colours and shapes break."""


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
            **found_by(*PERSONALIZE),
            inputs=[
                io.Model.Input("model", tooltip="The model that the reference was encoded with."),
                Adapters.Input(
                    "adapters",
                    tooltip="From Load DreamCache Adapters, trained for this model; or from Adapters from Model.",
                ),
                Reference.Input("reference", tooltip="From Encode Reference or Load Reference."),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How strongly the subject comes through: 0 is exactly the plain model, 1 as the adapters were trained.",
                ),
                image_guidance_input(
                    "How closely the image is held to the reference: 0 loosely; 1 plainly, and fastest (two predictions a step "
                    "instead of three); above 1 more likeness and less prompt. The sampler's cfg is the text's part. With several "
                    "Applies the last one that is not at its defaults holds."
                ),
                advanced(
                    percent_input(
                        "start_percent",
                        0.0,
                        "From where in the run the reference acts. 0: from the first step. Later, the prompt alone lays the image "
                        "out, and the reference only changes details.",
                    )
                ),
                advanced(
                    percent_input(
                        "end_percent",
                        1.0,
                        "Up to where in the run the reference acts. 1: to the last step. Earlier, the last details are the "
                        "plain model's.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "guidance",
                        options=["separate", "joint"],
                        default="separate",
                        tooltip="separate: cfg sets how much the text counts, image_guidance how much the reference. joint: cfg sets "
                        "both (two predictions a step), and image_guidance has no effect.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the new image the subject may appear: 1 inside; outside, the plain model draws. Not "
                    "connected: anywhere.",
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
        model, text = put_on_model(
            cls,
            model,
            adapters,
            reference,
            scale=scale,
            image_guidance=image_guidance,
            start_percent=start_percent,
            end_percent=end_percent,
            guidance=guidance,
            mask=mask,
        )
        return io.NodeOutput(model, ui=report(cls, text))


def put_on_model(
    node: type[io.ComfyNode],
    model: Any,
    adapters: AdapterSet,
    reference: ReferenceCache,
    *,
    scale: float = 1,
    image_guidance: float,
    start_percent: float = 0,
    end_percent: float = 1,
    guidance: str = "separate",
    mask: Tensor | None = None,
) -> tuple[Any, str]:
    """Put a reference on a clone of a MODEL, as Apply DreamCache does with these inputs.

    Returns:
        The clone, and what the node says of it.

    Raises:
        MismatchError: Model, adapters and reference do not belong together.
    """
    layout = adapters.info.layout
    require_model_fit(model, layout)
    require_same_layout(
        reference.layout, "The reference was encoded with", layout, "the adapters are for"
    )
    region, _ = given_mask(mask)
    warnings = list(_warnings(model, adapters, start_percent, end_percent, image_guidance, region))
    patcher = adapter_patcher(adapters, model)
    use = ReferenceUse(reference, patcher.model, scale=scale, mask=region)
    settings = Guidance.from_dict({"image_guidance_scale": image_guidance, "mode": guidance})
    uses = (AppliedUse(use, patcher, start_percent, end_percent, node_id(node)),)
    applied = Applied(uses, settings, node_id(node))
    own = _in_words(settings)
    if before := applied_to(model):
        applied = applied.after(before)
        warnings.extend(_conflict(_in_words(before.guidance), own))
    for warning in warnings:
        logger.warning(warning)
    warnings.extend(filter(None, [use.timestep_mismatch]))  # which is in the log already
    text = _subject(applied, scale)
    if mask is not None and region is None:
        text += ", everywhere: the mask is what Load Image gives with an image that has none"
    if (held := _in_words(applied.guidance)) != own:
        text += f", {held} as set in the Apply DreamCache before"
    return with_references(model, applied), " ".join(warnings) or text


def _subject(applied: Applied, scale: float) -> str:
    """Which subject it is, and what a step costs with it."""
    number, guidance = len(applied.uses), applied.guidance
    text = f"subject {number} of {number}" if number > 1 else "subject 1"
    if number > 1 and all(each.use.regions is None for each in applied.uses):
        text += ", all everywhere (a region for each keeps them apart)"
    if not guidance.needs_unconditional:
        text += ", two predictions a step"
    else:
        start, end = guidance.image_range
        part = f" from {start:g} to {end:g} of the run, else two"
        text += f", three predictions a step{part if (start, end) != (0, 1) else ''}"
    return text if scale else f"{text}, but its strength is 0: it does not appear"


def _warnings(
    model: Any,
    adapters: AdapterSet,
    start_percent: float,
    end_percent: float,
    image_guidance: float,
    region: Tensor | None,
) -> Iterator[str]:
    """What is allowed, but hardly meant."""
    if image_guidance > MOST_GUIDANCE:
        yield f"image_guidance {image_guidance:g} is far beyond 5, up to where it is of use: expect broken colours and shapes."
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
    if fitted_to_another(unet_of(model), adapters):
        yield (
            "These adapters were fitted to another model: expect a weaker likeness. Fit them to this one with Adapters from "
            "Model."
        )
    if start_percent >= end_percent:
        yield (
            f"Apply DreamCache acts from {start_percent} to {end_percent} of the run, which is never: the images will be "
            "the plain model's."
        )
    if region is not None and (num_empty := sum(not bool(row.any()) for row in region)):
        which = f" for {num_empty} of {len(region)} images" if num_empty < len(region) else ""
        yield (
            f"The mask of Apply DreamCache is empty{which}: the subject appears nowhere{which and ' in those'}. Mark its "
            "place with white, or leave mask unconnected for all of the image."
        )


def _in_words(guidance: Guidance) -> str:
    if guidance.mode == "joint":
        return "guidance joint"
    return f"image_guidance {guidance.image_guidance_scale:g}"


def _conflict(before: str, own: str) -> Iterator[str]:
    """Two Apply nodes that both set the guidance, which belongs to the run."""
    default, former = _in_words(Guidance()), _in_words(FORMER_DEFAULT)
    if before != own and not {before, own} & {default, former}:
        yield (
            f"A run has one guidance, and two Apply DreamCache nodes set it: {before} before, {own} here. That of the last "
            f"one, {own}, holds for all subjects. Set it in one of them and leave the others at their defaults, {default} and "
            "guidance separate."
        )


NODES: list[type[io.ComfyNode]] = [Apply]
