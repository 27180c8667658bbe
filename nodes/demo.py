"""Nodes that let people try the method without downloading a model."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..dreamcache_core import InputError, load_adapters
from ..dreamcache_core.demo.files import require_demo_files
from ..dreamcache_core.demo.world.shapes import SHAPES, UNSEEN_SHAPES
from ..dreamcache_core.demo.world.world import (
    IMAGE_SIZE,
    draw_subject,
    draw_training_image,
    render_cutout,
)
from ..dreamcache_core.images.tensors import image_to_tensor
from .host.demo import load_clip, load_unet, load_vae
from .host.report import report
from .sockets import SUBJECT, Adapters, advanced, found_by, seed_input

ANY_SHAPE = "any"
PHOTO_SHAPES = (ANY_SHAPE, *(shape for shape in SHAPES if shape not in UNSEEN_SHAPES))
NUM_SHOWN = 8
"""Photos that the node shows."""


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
                advanced(
                    io.Int.Input(
                        "views",
                        default=1,
                        min=1,
                        max=64,
                        optional=True,
                        tooltip="Images of the subject, each in another pose: a batch, which becomes one reference.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="For Encode Reference."),
                io.Mask.Output(display_name="mask", tooltip="1 = subject. For Encode Reference."),
            ],
        )

    @classmethod
    def execute(cls, shape: str, seed: int, views: int = 1) -> io.NodeOutput:
        """Draw it."""
        if shape not in SHAPES:
            raise InputError(f"shape must be one of {', '.join(SHAPES)}; given {shape!r}.")
        random = np.random.default_rng(seed)
        subject = draw_subject(random, shape)
        cutouts = [image_to_tensor(render_cutout(subject, random)) for _ in range(views)]
        image, mask = torch.cat(cutouts).split([3, 1], dim=-1)
        mask = mask[..., 0]
        return io.NodeOutput(image, mask, ui=ui.PreviewImage(image, cls=cls))


class DemoPhotos(io.ComfyNode):
    """Draw images of the demo model's world, with masks and captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheDemoPhotos",
            display_name="DreamCache Demo Photos",
            category="DreamCache/demo",
            description="Draws images in the place of your photos for the demo model, each of another subject in a scene, with its "
            "mask and caption: to try training, or many subjects in one run, without a folder of images.",
            **found_by("example", "tutorial", "dataset", *SUBJECT),
            inputs=[
                io.Combo.Input(
                    "shape",
                    options=list(PHOTO_SHAPES),
                    default=ANY_SHAPE,
                    tooltip="What the images show.",
                ),
                io.Int.Input("count", default=20, min=1, max=10_000, tooltip="Number of images."),
                seed_input("Decides the subjects and their scenes."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="For Train DreamCache Adapters; or for Encode Reference, which then runs once for each.",
                ),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="The subject of each image.",
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="The caption of each image.",
                ),
            ],
        )

    @classmethod
    def execute(cls, shape: str, count: int, seed: int) -> io.NodeOutput:
        """Draw them."""
        if shape not in PHOTO_SHAPES:
            raise InputError(f"shape must be one of {', '.join(PHOTO_SHAPES)}; given {shape!r}.")
        wanted = None if shape == ANY_SHAPE else shape
        drawn = [
            draw_training_image(np.random.default_rng((seed, index)), wanted)
            for index in range(count)
        ]
        marked = [image_to_tensor(image) for image, _ in drawn]
        images, masks = [each[..., :3] for each in marked], [each[..., 3] for each in marked]
        captions = [caption for _, caption in drawn]
        shown = ui.PreviewImage(torch.cat(images[:NUM_SHOWN]), cls=cls)
        return io.NodeOutput(images, masks, captions, ui=shown)


NODES: list[type[io.ComfyNode]] = [DemoModel, DemoReference, DemoPhotos]
