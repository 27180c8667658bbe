"""The subject in an image that is there already."""

from typing import NamedTuple

from dreamcache_core.demo.world.world import IMAGE_SIZE

from .parts import (
    SD15,
    Base,
    Texts,
    checkpoint,
    decoded,
    demo,
    empty,
    from_photo,
    sampler,
    saved,
    texts,
    with_and_without,
)
from .workflow import Node, Output, Workflow

BOX_PX = 96
INPAINTING = (
    "### Into an image, where you say\nOnly what the mask marks is drawn anew, with the subject in it; around it the image stays.\n\n"
    "The prompt says what is to be seen there. Give the subject room: the mask should be about as large as it shall be."
)
REDRAWING = (
    "### An image drawn again, with the subject\n**denoise** of the sampler says how much of the image may change: at 0.5 colours and "
    "places stay, at 0.8 little more than the light does. The subject comes from the reference."
)


def _photos(flow: Workflow, note: str, scene: str) -> tuple[Base, Texts, Node, Output, Output]:
    """A subject and a scene from files: model, texts, the scene, its latent, and the model with the subject."""
    flow.column()
    flow.note("What this is", note)
    flow.column()
    base = checkpoint(flow, SD15)
    subject = flow.add("LoadImage", title="Your subject", width_px=340, image="example.png")
    image = flow.add("LoadImage", title=scene, width_px=340, image="example.png")
    flow.column()
    sized = flow.add(
        "ImageScale",
        image=image["IMAGE"],
        upscale_method="lanczos",
        width=512,
        height=512,
        crop="center",
    )
    flow.column()
    model = from_photo(flow, base, subject["IMAGE"], subject["MASK"])["model"]
    latent = flow.add("VAEEncode", pixels=sized["IMAGE"], vae=base.vae)["LATENT"]
    prompts = texts(flow, base, "a photo of a cat on a beach at sunset")
    return base, prompts, image, latent, model


def inpainting() -> Workflow:
    """Into a photo."""
    flow = Workflow("DreamCache 5 - Into a photo by inpainting (SD 1.5)")
    note = f"{INPAINTING}\n\n**The scene**: right-click it, *Open in MaskEditor*, and paint where the subject shall be."
    base, prompts, scene, latent, model = _photos(flow, note, "The scene, with a painted mask")
    flow.column()
    marked = flow.add("SetLatentNoiseMask", samples=latent, mask=scene["MASK"])
    flow.column()
    return saved(flow, base, sampler(flow, base, model, prompts, marked["LATENT"]))


def image_to_image() -> Workflow:
    """Over a photo."""
    flow = Workflow("DreamCache 5 - Image to image (SD 1.5)")
    base, prompts, _, latent, model = _photos(flow, REDRAWING, "The image to draw again")
    flow.column()
    return saved(flow, base, sampler(flow, base, model, prompts, latent, denoise=0.7))


class Drawn(NamedTuple):
    """A scene that the demo model drew, and what is to come into it."""

    base: Base
    prompts: Texts
    scene: Output
    image: Output
    model: Output


def _drawn(flow: Workflow, note: str, scene: str, prompt: str, shape: str, seed: int) -> Drawn:
    """Draw a scene, and prepare the subject of a shape and seed."""
    flow.column()
    flow.note("What this is", f"{note}\n\nThe demo model draws it: nothing has to be downloaded.")
    flow.column()
    base = demo(flow)
    subject = flow.add("DreamCacheDemoReference", title="The subject", shape=shape, seed=seed)
    latent = empty(flow, base, images=4)
    flow.column()
    model = from_photo(flow, base, subject["image"], subject["mask"])["model"]
    prompts = texts(flow, base, prompt)
    before = flow.add("CLIPTextEncode", title="The scene before", clip=base.clip, text=scene)
    noise = flow.add("PrimitiveInt", title="Seed of the scene", value=1)["INT"]
    flow.column()
    given = Texts(before, prompts.negative)
    drawn = sampler(flow, base, base.model, given, latent, title="The scene before", seed=noise)
    (shown,) = decoded(flow, base, drawn)
    return Drawn(base, prompts, drawn["LATENT"], shown, model)


def _before(flow: Workflow, drawn: Drawn) -> None:
    """A column that begins with the scene as it was."""
    flow.column()
    flow.add("PreviewImage", title="Before", width_px=420, images=drawn.image)


def inpainting_demo() -> Workflow:
    """Into a drawing."""
    flow = Workflow("DreamCache 5 - Into an image by inpainting (no download)")
    note = f"{INPAINTING} Here it is a box in the middle."
    drawn = _drawn(flow, note, "a house on the beach", "a cat on the beach", "cat", 1)
    nothing, box = (
        flow.add("SolidMask", title=title, value=value, width=size, height=size)
        for title, value, size in (("Empty mask", 0.0, IMAGE_SIZE), ("Mask of a box", 1.0, BOX_PX))
    )
    _before(flow, drawn)
    mask = flow.add(
        "MaskComposite",
        title="What is drawn anew",
        destination=nothing["MASK"],
        source=box["MASK"],
        x=(IMAGE_SIZE - BOX_PX) // 2,
        y=(IMAGE_SIZE - BOX_PX) // 2,
        operation="add",
    )
    flow.column()
    marked = flow.add("SetLatentNoiseMask", samples=drawn.scene, mask=mask["MASK"])
    with_and_without(flow, drawn.base, drawn.model, drawn.prompts, marked["LATENT"])
    return flow


def image_to_image_demo() -> Workflow:
    """Over a drawing."""
    flow = Workflow("DreamCache 5 - Image to image (no download)")
    scene = "a heart on the beach, right"
    drawn = _drawn(flow, REDRAWING, scene, scene, "heart", 1)
    _before(flow, drawn)
    with_and_without(flow, drawn.base, drawn.model, drawn.prompts, drawn.scene, denoise=0.8)
    return flow
