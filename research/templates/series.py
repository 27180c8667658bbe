"""Many images at once: of several strengths, of a folder of subjects; and adapters that are trained."""

from .parts import SD15, checkpoint, decoded, demo, empty, encoded_subject, sampler, texts
from .workflow import Workflow

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
        "downloaded. With a checkpoint in place of **DreamCache Demo Model** it is your model's answer.",
    )
    flow.column()
    base = demo(flow)
    subject = flow.add("DreamCacheDemoReference", title="The subject", shape="house", seed=2)
    flow.column()
    adapters = base.photo["loaded_adapters"]
    reference = encoded_subject(flow, base, subject, adapters)
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
    trained = flow.add(
        "DreamCacheTrainAdapters",
        width_px=420,
        model=base.model,
        vae=base.vae,
        clip=base.clip,
        images=images["images"],
        masks=images["masks"],
        captions=images["captions"],
        steps=300,
    )
    flow.column()
    flow.add("DreamCacheSaveAdapters", adapters=trained["adapters"], filename_prefix="my_adapters")
    flow.add("PreviewImage", title="The loss", width_px=420, images=trained["loss_curve"])
    return flow
