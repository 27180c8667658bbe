"""Photos whose background a node of ComfyUI's own takes away."""

from .parts import SD15, Base, checkpoint, empty, from_photo, sampler, saved, texts
from .workflow import Node, Output, Workflow

NEWER = "**Needs ComfyUI 0.33 or newer**, for the node"


def _photo_with_mask(flow: Workflow, base: Base, image: Node, mask: Output) -> None:
    """From a photo and its mask to the saved image."""
    flow.column()
    photo = from_photo(flow, base, image["IMAGE"], mask)
    flow.column()
    prompts = texts(flow, base, "a photo of a cat on a beach at sunset")
    latent = empty(flow, base)
    flow.column()
    saved(flow, base, sampler(flow, base, photo["model"], prompts, latent))


def background_removed() -> Workflow:
    """By a segmentation network."""
    flow = Workflow("DreamCache 3 - Photo, background removed (SD 1.5, ComfyUI 0.33)")
    flow.column()
    flow.note(
        "What this is",
        f"### A plain photo, cut out by itself\n{NEWER} *Remove Background*. It finds the subject of the photo, whatever it is, and its "
        "mask goes into **DreamCache from Photo**: the line on that node says how much of the photo the subject covers.\n\nTwo files: "
        "the checkpoint, and `birefnet.safetensors` for `models/background_removal`. ComfyUI offers both for download where they are "
        "missing.",
    )
    flow.column()
    base = checkpoint(flow, SD15)
    remover = flow.add(
        "LoadBackgroundRemovalModel", width_px=340, bg_removal_name="birefnet.safetensors"
    )
    image = flow.add("LoadImage", title="Your photo", width_px=340, image="example.png")
    flow.column()
    mask = flow.add("RemoveBackground", image=image["IMAGE"], bg_removal_model=remover["bg_model"])
    _photo_with_mask(flow, base, image, mask["mask"])
    return flow


def subject_by_word() -> Workflow:
    """By a word for it."""
    flow = Workflow("DreamCache 3 - Photo, subject by a word (SD 1.5, ComfyUI 0.33)")
    flow.column()
    flow.note(
        "What this is",
        f'### Say what the subject is\n{NEWER} *SAM3 Detect*. Write what you want from the photo into **The subject**, "the cat", and its '
        "mask goes into **DreamCache from Photo**: the line on that node says how much of the photo the subject covers.\n\nTwo files: "
        "the checkpoint, and `sam3.1_multiplex_fp16.safetensors`, for `models/checkpoints` both. ComfyUI offers them for download "
        "where they are missing.",
    )
    flow.column()
    base = checkpoint(flow, SD15)
    finder = flow.add(
        "CheckpointLoaderSimple",
        title="Load SAM 3",
        width_px=340,
        ckpt_name="sam3.1_multiplex_fp16.safetensors",
    )
    image = flow.add("LoadImage", title="Your photo", width_px=340, image="example.png")
    flow.column()
    word = flow.add("CLIPTextEncode", title="The subject", clip=finder["CLIP"], text="cat")
    flow.column()
    found = flow.add(
        "SAM3_Detect",
        model=finder["MODEL"],
        image=image["IMAGE"],
        conditioning=word["CONDITIONING"],
    )
    _photo_with_mask(flow, base, image, found["masks"])
    return flow
