"""Many images at once: of several strengths, of a folder of subjects; and adapters that are trained."""

from typing import Any

from dreamcache_core.demo.world.world import IMAGE_SIZE

from .parts import (
    SD15,
    Base,
    checkpoint,
    decoded,
    demo,
    empty,
    encoded,
    from_photo,
    sampler,
    texts,
    with_and_without,
)
from .workflow import Node, Workflow

GRID = (0.4, 1.0, 2.0)


def guidance_grid() -> Workflow:
    """The same noise at several image guidances."""
    flow = Workflow("DreamCache 7 - Which image_guidance, side by side (no download)")
    flow.column()
    flow.note(
        "What this is",
        "### How closely?\nThe same noise and prompt with three values of **image_guidance**: low keeps more to the prompt, high more to the "
        "subject. The *scene*, *balanced* and *likeness* of **DreamCache from Photo** are 0.4, 1 and 2; for other values set its "
        "**strength** to *custom*.\n\nThe demo model draws it: nothing has to be "
        "downloaded. For your model's answer, put a checkpoint and **Adapters from Model** in place of "
        "**DreamCache Demo Model**, a photo in place of **The subject**, and 512 into **Empty Latent Image**.",
    )
    flow.column()
    base = demo(flow)
    subject = flow.add("DreamCacheDemoReference", title="The subject", shape="house", seed=9)
    flow.column()
    adapters = base.photo["loaded_adapters"]
    reference = encoded(flow, base, subject["image"], subject["mask"], adapters)
    prompts = texts(flow, base, "a house in the snow")
    latent = empty(flow, base, images=4)
    flow.column()
    applied = [
        flow.add(
            "DreamCacheApply",
            model=base.model,
            adapters=adapters,
            reference=reference,
            image_guidance=value,
        )["model"]
        for value in GRID
    ]
    seed = flow.add("PrimitiveInt", title="Seed of all", value=0)["INT"]
    flow.column()
    drawn = [sampler(flow, base, model, prompts, latent, seed=seed) for model in applied]
    images = decoded(flow, base, *drawn)
    flow.column()
    for value, image in zip(GRID, images, strict=True):
        flow.add("PreviewImage", title=f"image_guidance {value:g}", width_px=420, images=image)
    return flow


def folder_of_subjects() -> Workflow:
    """One prompt with every image of a folder."""
    flow = Workflow("DreamCache 8 - A folder of subjects, one prompt (SD 1.5)")
    flow.column()
    flow.note(
        "What this is",
        "### Every image of a folder\nPut images of subjects, best PNGs with a transparent background, into a folder below ComfyUI's "
        "`input` folder, press **R** and choose it. All that follows runs once for each, and the files are named after the images.\n\n"
        "**one_subject** on: all images show the same subject and become one reference.",
    )
    flow.column()
    base = checkpoint(flow, SD15)
    flow.column()
    adapters = flow.add("DreamCacheModelAdapters", model=base.model, clip=base.clip)["adapters"]
    flow.column()
    folder = flow.add(
        "DreamCacheEncodeFolder",
        model=base.model,
        vae=base.vae,
        clip=base.clip,
        folder="choose a folder",
        adapters=adapters,
    )
    prompts = texts(flow, base, "a photo of a toy on a beach at sunset")
    latent = empty(flow, base)
    flow.column()
    applied = flow.add(
        "DreamCacheApply", model=base.model, adapters=adapters, reference=folder["reference"]
    )
    flow.column()
    drawn = sampler(flow, base, applied["model"], prompts, latent)
    (shown,) = decoded(flow, base, drawn)
    flow.column()
    flow.add("SaveImage", width_px=480, images=shown, filename_prefix=folder["name"])
    return flow


def many_subjects_demo() -> Workflow:
    """One prompt with many subjects of the demo model."""
    flow = Workflow("DreamCache 8 - Many subjects, one prompt (no download)")
    flow.column()
    flow.note(
        "What this is",
        "### Once for each\n**DreamCache Demo Photos** gives a list: **DreamCache from Photo** and all that follows run once for each of its "
        "images, and **Preview Image** shows all results together. For a folder of your own there is **Encode Reference Folder**: "
        "see the template *A folder of subjects, one prompt*.\n\nThe demo model draws it: nothing has to be downloaded.",
    )
    flow.column()
    base = demo(flow)
    photos = flow.add("DreamCacheDemoPhotos", shape="mug", count=4, seed=1)
    flow.column()
    model = from_photo(flow, base, photos["images"], photos["masks"])["model"]
    prompts = texts(flow, base, "a mug in the snow")
    latent = empty(flow, base)
    flow.column()
    drawn = sampler(flow, base, model, prompts, latent)
    (shown,) = decoded(flow, base, drawn)
    flow.column()
    flow.add("PreviewImage", title="One for each", width_px=480, images=shown)
    return flow


def train_demo() -> Workflow:
    """Adapters that are trained on drawn images, and an image with them."""
    flow = Workflow("DreamCache 9 - Train your own adapters (no download)")
    flow.column()
    flow.note(
        "What this is",
        "### Training, to see how it runs\n**DreamCache Demo Photos** draws twenty images with masks and captions, **Train DreamCache Adapters** "
        "starts from adapters that are fitted to the model and takes twenty steps, all in a minute or two on a CPU. The loss hardly falls, and so "
        "short a training teaches next to nothing: raise **count** and **steps** to a thousand for that.\n\nOn the right, an image with the new adapters, and "
        "without. They are gone when ComfyUI ends: **Save DreamCache Adapters** keeps them. With a model and photos of your own take *Train your own adapters (SD 1.5)*.",
    )
    flow.column()
    base = demo(flow)
    photos = flow.add("DreamCacheDemoPhotos", count=20, seed=0)
    flow.column()
    trained = _trained(flow, base, photos, steps=20, resolution=IMAGE_SIZE)
    subject = flow.add("DreamCacheDemoReference", title="The subject", shape="mushroom", seed=1)
    flow.column()
    base = base._replace(
        photo={**base.photo, "loaded_adapters": trained["adapters"], "strength": "likeness"}
    )
    model = from_photo(flow, base, subject["image"], subject["mask"])["model"]
    flow.column()
    prompts = texts(flow, base, "a mushroom on the grass, left")
    latent = empty(flow, base, images=4)
    with_and_without(flow, base, model, prompts, latent)
    return flow


def train_your_own() -> Workflow:
    """From a folder of images to an adapter file."""
    flow = Workflow("DreamCache 9 - Train your own adapters (SD 1.5)")
    flow.column()
    flow.note(
        "1. The images",
        "### 1. The images\nA folder below ComfyUI's `input` folder: `x.png`, its caption `x.txt` and its mask `masks/x.png` (white = "
        "subject). **Many different subjects**, whole photographs. Press **R** and choose the folder. If the sheet shows backgrounds in "
        "the references, masks are missing.",
    )
    flow.note(
        "2. Training",
        "### 2. Training\nA try-out of 300 steps from adapters that are fitted to the model. The loss hardly falls: what tells is an "
        "image. Cancel whenever you like; what was learnt is kept. Then take **DreamCache 2 - Your photo** and choose the saved file.",
    )
    flow.column()
    base = checkpoint(flow, SD15)
    images = flow.add("DreamCacheLoadTrainingSet", width_px=420, folder="choose a folder")
    flow.column()
    trained = _trained(flow, base, images, steps=300)
    flow.column()
    flow.add("DreamCacheSaveAdapters", adapters=trained["adapters"], filename_prefix="my_adapters")
    flow.add("PreviewImage", title="The loss", width_px=420, images=trained["loss_curve"])
    return flow


def _trained(flow: Workflow, base: Base, images: Node, **more: Any) -> Node:
    """Adapters that are trained on what a node gives: images, masks and captions."""
    return flow.add(
        "DreamCacheTrainAdapters",
        width_px=420,
        model=base.model,
        vae=base.vae,
        clip=base.clip,
        images=images["images"],
        masks=images["masks"],
        captions=images["captions"],
        **more,
    )
