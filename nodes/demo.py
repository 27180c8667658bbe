"""Nodes that let people try the method without downloading a model."""

import numpy as np
from comfy_api.latest import io, ui

from ..dreamcache_core import InputError, load_adapters
from ..dreamcache_core.demo.files import require_demo_files
from ..dreamcache_core.demo.world.shapes import SHAPES
from ..dreamcache_core.demo.world.world import IMAGE_SIZE, draw_subject, render_cutout
from ..dreamcache_core.images.tensors import image_to_tensor
from .host.demo import load_clip, load_unet, load_vae
from .host.report import report
from .sockets import SUBJECT, Adapters, found_by, seed_input


class DemoModel(io.ComfyNode):
    """Load the small model that comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheDemoModel",
            display_name="DreamCache Demo Model",
            category="DreamCache/demo",
            description="A small model of Stable Diffusion's structure that comes with the pack, and its adapters: to see "
            "DreamCache work in a minute, without a download. It draws simple shapes of 128 x 128 pixels.",
            **found_by("example", "quickstart", "tutorial", "personalize", "personalise"),
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler, 128 x 128 pixels."),
                io.Clip.Output(display_name="clip", tooltip="It knows a few hundred words."),
                io.Vae.Output(display_name="vae", tooltip="For encoding and decoding images."),
                Adapters.Output(display_name="adapters", tooltip="For Apply DreamCache."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load all four."""
        files = require_demo_files()
        adapters = load_adapters(files.adapters)
        loaded = (load_unet(files), load_clip(files), load_vae(files), adapters)
        text = f"{len(SHAPES)} shapes, images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels"
        return io.NodeOutput(*loaded, ui=report(cls, text))


class DemoReference(io.ComfyNode):
    """Draw a reference image for the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheDemoReference",
            display_name="DreamCache Demo Reference",
            category="DreamCache/demo",
            description="Draws a reference image for the demo model: a shape on white, with colours and a pattern that no "
            "prompt could name. Another seed is another subject.",
            **found_by("example", "quickstart", "tutorial", *SUBJECT),
            inputs=[
                io.Combo.Input(
                    "shape",
                    options=list(SHAPES),
                    default="mug",
                    tooltip="What to draw. Name it in the prompt too.",
                ),
                seed_input("Decides colours, pattern and pose."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="For Encode Reference."),
                io.Mask.Output(display_name="mask", tooltip="1 = subject. For Encode Reference."),
            ],
        )

    @classmethod
    def execute(cls, shape: str, seed: int) -> io.NodeOutput:
        """Draw it."""
        if shape not in SHAPES:
            raise InputError(f"shape must be one of {', '.join(SHAPES)}; given {shape!r}.")
        random = np.random.default_rng(seed)
        cutout = image_to_tensor(render_cutout(draw_subject(random, shape), random))
        image, mask = cutout[..., :3], cutout[..., 3]
        return io.NodeOutput(image, mask, ui=ui.PreviewImage(image, cls=cls))


NODES: list[type[io.ComfyNode]] = [DemoModel, DemoReference]
