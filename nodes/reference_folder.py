"""The node that encodes a folder of images."""

import os
from dataclasses import replace
from typing import Any

from comfy.utils import ProgressBar
from comfy_api.latest import io
from torch import Tensor

from ..dreamcache_core import AdapterSet, ReferenceCache, prepare_reference_image
from ..dreamcache_core.images.files import read_image
from ..dreamcache_core.images.masks import shows_background
from ..dreamcache_core.images.sheets import encode_thumbnails
from .host.encode import encode_reference, kept_on_disk
from .host.folders import check_choice, choice_state, image_paths, left_out, list_image_folders
from .host.model import default_side_px
from .host.report import node_id, preview, report
from .reference import empty_prompt
from .sockets import SUBJECT, Reference, adapters_input, found_by, square_inputs


class EncodeFolder(io.ComfyNode):
    """Read the features of all images of a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheEncodeFolder",
            display_name="Encode Reference Folder (DreamCache)",
            category="DreamCache",
            description="Prepares and encodes every image of a folder below ComfyUI's input folder. The nodes after it run "
            "once for each reference. Transparent images are cut out by their alpha channel.",
            **found_by("batch", "directory", *SUBJECT),
            inputs=[
                io.Model.Input("model", tooltip="The model that you generate with."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Clip.Input("clip", tooltip="The model's CLIP."),
                io.Combo.Input(
                    "folder",
                    options=list_image_folders(),
                    tooltip="Folder below ComfyUI's input folder. Press R after making a new one.",
                ),
                io.Boolean.Input(
                    "one_subject",
                    default=False,
                    tooltip="Off: each image is a subject of its own. On: all show ONE subject and become one reference.",
                ),
                *square_inputs(0),
                adapters_input(),
            ],
            outputs=[
                Reference.Output(
                    display_name="reference",
                    is_output_list=True,
                    tooltip="For Apply DreamCache, or Save Reference.",
                ),
                io.String.Output(
                    display_name="name",
                    is_output_list=True,
                    tooltip="Name of each image without its ending, for filename_prefix.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        """Say where folders belong when this one is not there."""
        return check_choice(image_paths, folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, **_: Any) -> str:
        """Run again when an image comes, goes or changes."""
        return choice_state(image_paths, folder)

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        clip: Any,
        folder: str,
        one_subject: bool,
        size: int,
        fill: float,
        adapters: AdapterSet | None = None,
    ) -> io.NodeOutput:
        """Encode the images."""
        paths = image_paths(folder)
        text = empty_prompt(clip)
        size = size or default_side_px(model)
        progress = ProgressBar(2 * len(paths), node_id=node_id(cls))
        prepared = _Prepared(progress)
        for path in paths:
            prepared.add(path, vae, size, fill)
        references: list[ReferenceCache] = []
        for latent, thumbnail in zip(prepared.latents, prepared.thumbnails, strict=True):
            one = encode_reference(
                model,
                latent,
                text,
                seed=0,
                timestep=1,
                mask=None,
                adapters=adapters,
                progress=progress,
            )
            references.append(kept_on_disk(replace(one, thumbnails=thumbnail)))
        names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
        if one_subject:
            references, names = [ReferenceCache.concatenate(references)], [os.path.basename(folder)]
        told = references[0].describe()
        if not one_subject:
            told = f"{len(references)} references, each {told}"
        told = prepared.about_backgrounds() + left_out(folder) + told
        return io.NodeOutput(references, names, ui=report(cls, told))


class _Prepared:
    """What is kept of the images of a folder until all are prepared: VAE and U-Net need not take turns."""

    def __init__(self, progress: ProgressBar) -> None:
        self.progress = progress
        self.latents: list[Tensor] = []
        self.thumbnails: list[tuple[bytes, ...]] = []
        self.bare: list[str] = []

    def add(self, path: str, vae: Any, size: int, fill: float) -> None:
        """Prepare one more, and show it."""
        image, alpha = read_image(path)
        if alpha is None and shows_background(image):
            self.bare.append(os.path.basename(path))
        prepared, _ = prepare_reference_image(image, alpha, size=size, fill=fill)
        self.latents.append(vae.encode(prepared))
        self.thumbnails.append(encode_thumbnails(prepared))
        self.progress.update_absolute(len(self.latents), preview=preview(prepared))

    def about_backgrounds(self) -> str:
        """Name images whose background comes along; "" where there are none."""
        if not self.bare:
            return ""
        first = ", ".join(self.bare[:3]) + (", ..." if len(self.bare) > 3 else "")
        return f"{len(self.bare)} of {len(self.latents)} images show their background, which is then in the reference ({first}); "


NODES: list[type[io.ComfyNode]] = [EncodeFolder]
