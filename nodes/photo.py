"""The whole way from a photo to a model that draws its subject, as one node."""

import hashlib
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from comfy_api.latest import io, ui
from torch import Tensor, nn

from ..dreamcache_core import (
    AdapterSet,
    DreamCacheError,
    load_adapters,
    prepare_reference_image,
)
from ..dreamcache_core.files.tensor_file import read_header
from ..dreamcache_core.images.masks import find_subject
from .apply import put_on_model
from .host.folders import NO_ADAPTERS, adapter_path, check_choice, choice_state, list_adapter_files
from .host.model import default_side_px
from .host.report import node_id, report
from .host.sampling import bypass_loras
from .host.training.fit import fit_to_model
from .reference import empty_prompt, encode_images
from .sockets import (
    DEFAULT_GUIDANCE,
    MAX_SIDE_PX,
    PERSONALIZE,
    Adapters,
    Reference,
    advanced,
    found_by,
    image_guidance_input,
    mask_marks_input,
)

FROM_MODEL = "from this model"
STRENGTHS: Mapping[str, float] = {"scene": 0.4, "balanced": 1.0, "likeness": 2.0}
"""Image guidance by a word; docs/evidence has what each reaches."""
CUSTOM = "custom"

_fitted: "WeakKeyDictionary[nn.Module, tuple[Any, AdapterSet]]" = WeakKeyDictionary()
"""By U-Net: what the last adapters were fitted to, and these."""


class FromPhoto(io.ComfyNode):
    """Prepare, encode and apply."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        files = [file for file in list_adapter_files() if file != NO_ADAPTERS]
        is_chosen = len(files) == 1 and not _is_of_other_models(files[0])
        return io.Schema(
            node_id="DreamCacheFromPhoto",
            display_name="DreamCache from Photo",
            category="DreamCache",
            description="Puts the subject of a photo into the images of this model: cuts it out, looks at it once and applies it, all "
            "in one node. Its parts are nodes of their own.",
            **found_by("photo", "one image", "one click", *PERSONALIZE),
            inputs=[
                io.Model.Input("model", tooltip="The model that generates; LoRAs on it count."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Clip.Input("clip", tooltip="The model's CLIP."),
                io.Image.Input(
                    "image",
                    tooltip="Photo of the subject. Several in a batch are several views of one subject.",
                ),
                io.Combo.Input(
                    "adapters",
                    options=[FROM_MODEL, *files],
                    default=files[0] if is_chosen else FROM_MODEL,
                    tooltip="A file of models/dreamcache that was made for this kind of model, or 'from this model', which needs no "
                    "file and keeps less of the subject.",
                ),
                io.Combo.Input(
                    "strength",
                    options=[*STRENGTHS, CUSTOM],
                    default="balanced",
                    tooltip="What counts more. 'scene': the prompt. 'balanced': both, and fastest. 'likeness': the subject. 'custom': "
                    "the advanced numbers.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject (or the background) is. Without it the background stays in the reference, and comes "
                    "through in new images.",
                ),
                Adapters.Input(
                    "loaded_adapters",
                    optional=True,
                    tooltip="Adapters from another node, in place of the choice above.",
                ),
                advanced(mask_marks_input()),
                advanced(
                    image_guidance_input(
                        "For 'custom': how closely the image is held to the reference. 'scene' is 0.4, 'balanced' 1, 'likeness' 2."
                    )
                ),
                advanced(
                    io.Int.Input(
                        "size",
                        default=0,
                        min=0,
                        max=MAX_SIDE_PX,
                        step=8,
                        optional=True,
                        tooltip="Side in pixels of the square on which the model sees the subject. 0: 512, for SDXL 1024.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler."),
                Reference.Output(
                    display_name="reference",
                    tooltip="For Save Reference, or another Apply DreamCache.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, adapters: str | None = None) -> bool | str:
        """Say where adapters belong when the file is not there."""
        return adapters == FROM_MODEL or check_choice(adapter_path, adapters)

    @classmethod
    def fingerprint_inputs(cls, adapters: str | None, **_: Any) -> str:
        """Run again when the file changes."""
        return "" if adapters == FROM_MODEL else choice_state(adapter_path, adapters)

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        clip: Any,
        image: Tensor,
        adapters: str,
        strength: str,
        mask: Tensor | None = None,
        loaded_adapters: AdapterSet | None = None,
        mask_marks: str = "auto",
        image_guidance: float = DEFAULT_GUIDANCE,
        size: int = 0,
    ) -> io.NodeOutput:
        """Prepare the photo, get adapters, encode and apply."""
        node, side_px, text = node_id(cls), size or default_side_px(model), empty_prompt(clip)
        subject = find_subject(image, mask, mask_marks)
        prepared, masks = prepare_reference_image(image[..., :3], subject.opacity, size=side_px)
        if loaded_adapters is not None:
            chosen, source = loaded_adapters, "connected"
        elif adapters == FROM_MODEL:
            chosen, source = _fit_once(model, clip, text, side_px, node), "fitted, not trained"
        else:
            chosen, source = load_adapters(adapter_path(adapters)), adapters
        reference = encode_images(
            model,
            vae,
            prepared,
            None if subject.opacity is None else masks,
            text,
            adapters=chosen,
            node_id=node,
        )
        model, said = put_on_model(
            cls, model, chosen, reference, image_guidance=STRENGTHS.get(strength, image_guidance)
        )
        lines = f"{subject.note}; {said}; adapters: {source}"
        if strength != CUSTOM and image_guidance != DEFAULT_GUIDANCE:
            lines += f"; image_guidance {image_guidance:g} has no effect, as strength is {strength}: choose {CUSTOM}"
        preview = ui.PreviewImage(prepared, cls=cls).as_dict()
        return io.NodeOutput(model, reference, ui=preview | report(cls, lines).as_dict())


def _is_of_other_models(file: str) -> bool:
    """Whether an adapter file says that it is of no Stable Diffusion, but of the demo model, say.

    The authors' files say nothing, and what is damaged is named when it is used.
    """
    try:
        return read_header(adapter_path(file)).metadata.get("family", "").startswith("custom")
    except (DreamCacheError, OSError):
        return False


def _fit_once(model: Any, clip: Any, text: list[Any], size_px: int, node: str | None) -> AdapterSet:
    """Fit adapters to a MODEL, unless the last ones were fitted to the same; another photo needs no others."""
    sampling = model.get_model_object("model_sampling")
    state = (
        model.patches_uuid,
        size_px,
        type(sampling).__mro__,
        _digest(sampling.sigmas),
        _digest(text[0][0]),
    )
    known = _fitted.get(model.model.diffusion_model)
    if known is None or known[0] != state or bypass_loras(model):
        known = state, fit_to_model(model, clip, size_px=size_px, seed=0, node_id=node)
        _fitted[model.model.diffusion_model] = known
    return known[1]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()


NODES: list[type[io.ComfyNode]] = [FromPhoto]
