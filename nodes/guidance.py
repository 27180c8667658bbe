"""Nodes that say how texts and references guide: marks on texts, a guider, a range."""

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from .host.applied import require_applied
from .host.gates import gate_conditioning
from .host.guider import DreamCacheCFGGuider
from .host.report import report
from .host.wrappers import with_references
from .sockets import found_by, image_guidance_input, percent_input


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
            **found_by("regional prompt", "perp-neg", "subject", "reference"),
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The text to mark."),
                io.Boolean.Input(
                    "use_reference",
                    default=True,
                    tooltip="On: this text draws with the reference. Off: as the plain model would.",
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
            **found_by("cfg"),
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
                    tooltip="How closely the image is held to the text: 1 is off, 7.5 is usual.",
                ),
                image_guidance_input(
                    "How closely the image is held to the reference, in place of what Apply DreamCache sets: 0 loosely; 1 "
                    "plainly, and fastest; above 1 more likeness and less prompt."
                ),
                io.Conditioning.Input(
                    "unconditional",
                    optional=True,
                    tooltip="The text that stands in where neither prompt nor reference counts; the negative if not connected. No "
                    "effect at image_guidance 1.",
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
            **found_by("faster", "speed", "schedule", "ip adapter", "ipadapter"),
            inputs=[
                io.Model.Input("model", tooltip="From Apply DreamCache."),
                percent_input(
                    "start_percent",
                    0.0,
                    "Progress from which on image_guidance holds: 0 from the first step.",
                ),
                percent_input(
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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, start_percent: float, end_percent: float) -> io.NodeOutput:
        """Set the range on a clone."""
        applied = require_applied(model, "DreamCache Guidance Range")
        guidance = replace(applied.guidance, image_range=(start_percent, end_percent))
        text = f"three predictions a step from {start_percent:g} to {end_percent:g} of the run, else two"
        if not guidance.needs_unconditional:
            text = "no effect while image_guidance is 1 or guidance joint: a step needs two predictions anyway"
        model = with_references(model, replace(applied, guidance=guidance))
        return io.NodeOutput(model, ui=report(cls, text))


NODES: list[type[io.ComfyNode]] = [Conditioning, Guider, GuidanceRange]
