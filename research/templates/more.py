"""References kept in a file, looked into, of several images, and beside a LoRA."""

from typing import Any

from .parts import (
    SD15,
    checkpoint,
    decoded,
    demo,
    empty,
    encoded,
    from_photo,
    sampler,
    saved,
    texts,
    with_and_without,
)
from .workflow import MUTED, Workflow


def save_once() -> Workflow:
    """A reference that is saved on the left and loaded on the right."""
    flow = Workflow("DreamCache 6 - Save once and reuse (no download)")
    flow.column()
    flow.note(
        "Save",
        "### 1. Save\n**Run**: the reference goes into `output/dreamcache`. From there it can be loaded in any workflow with the same "
        "kind of model, without the photo and without encoding again.\n\nThe demo model draws it: nothing has to be downloaded.",
    )
    flow.note(
        "Reuse",
        "### 2. Reuse\nPress **R**, choose the file in **Load Reference**, select the grey nodes (Ctrl and drag) and press **Ctrl M**: now "
        "they run too. Mute **Save Reference** likewise, or each run writes another file. Files that you want to keep go to `models/dreamcache/references`.",
    )
    flow.column()
    base = demo(flow)
    subject = flow.add("DreamCacheDemoReference", title="The subject", shape="house", seed=1)
    flow.column()
    adapters = base.photo["loaded_adapters"]
    reference = encoded(flow, base, subject["image"], subject["mask"], adapters)
    loaded = flow.add(
        "DreamCacheLoadReference",
        mode=MUTED,
        reference="dreamcache/house_00001_.safetensors [output]",
    )
    flow.column()
    flow.add("DreamCacheSaveReference", reference=reference, filename_prefix="dreamcache/house")
    applied = flow.add(
        "DreamCacheApply",
        mode=MUTED,
        model=base.model,
        adapters=adapters,
        reference=loaded["reference"],
        image_guidance=1.0,
    )
    prompts = texts(flow, base, "a house in the snow")
    latent = empty(flow, base, images=4)
    flow.column()
    drawn = sampler(flow, base, applied["model"], prompts, latent, mode=MUTED)
    flow.column()
    decode = flow.add("VAEDecode", mode=MUTED, width_px=220, samples=drawn["LATENT"], vae=base.vae)
    flow.column()
    flow.add("PreviewImage", mode=MUTED, width_px=420, images=decode["IMAGE"])
    return flow


def attention_map() -> Workflow:
    """Where a new image looks in its reference."""
    flow = Workflow("DreamCache 7 - Where it looks, attention map (no download)")
    flow.column()
    flow.note(
        "What this is",
        "### Where the new image looks\n**DreamCache Attention Map** shows on the left the reference, lit where it is looked at, and on the "
        "right the new image, each place in the colour of what it looks at most. **point_x** and **point_y** "
        "ask for one place, here on the side of the tree: the same stripe of the reference lights up. A **mask** asks for a part of the new image, and with neither "
        "its background has most of the say.\n\nThe demo model draws it: nothing has to be downloaded.",
    )
    flow.column()
    base = demo(flow)
    subject = flow.add("DreamCacheDemoReference", title="The subject", shape="tree", seed=1)
    flow.column()
    model = from_photo(flow, base, subject["image"], subject["mask"])["model"]
    prompts = texts(flow, base, "a tree on the grass, left")
    latent = empty(flow, base)
    flow.column()
    drawn = sampler(flow, base, model, prompts, latent)
    (shown,) = decoded(flow, base, drawn)
    looked = flow.add(
        "DreamCacheAttentionMap",
        model=model,
        positive=prompts.prompt["CONDITIONING"],
        latent=drawn["LATENT"],
        reference_image=subject["image"],
        point_x=0.18,
        point_y=0.5,
    )
    flow.column()
    flow.add("PreviewImage", title="The new image", width_px=420, images=shown)
    flow.add("PreviewImage", title="Where it looks", width_px=420, images=looked["image"])
    return flow


def several_images() -> Workflow:
    """Three photos of one subject."""
    flow = Workflow("DreamCache 8 - Several photos of one subject (SD 1.5)")
    flow.column()
    flow.note(
        "What this is",
        "### Several views, one subject\nA photo from the front does not show the back. **Combine References** lets the new image look at "
        "all three; each is encoded once. Take each with its mask: a PNG with a transparent background, or paint over the subject in the "
        "mask editor.\n\nOne more: Load Image, Encode Reference, and the next input of Combine References. For two *different* subjects take "
        "the template *Two subjects in regions*.",
    )
    flow.column()
    base = checkpoint(flow, SD15)
    photos = [
        flow.add("LoadImage", title=f"Photo {number}", width_px=340, image="example.png")
        for number in (1, 2, 3)
    ]
    flow.column()
    adapters = flow.add("DreamCacheModelAdapters", model=base.model, clip=base.clip)["adapters"]
    flow.column()
    references = [encoded(flow, base, photo["IMAGE"], photo["MASK"], adapters) for photo in photos]
    flow.column()
    named: dict[str, Any] = {f"reference_{number}": one for number, one in enumerate(references, 1)}
    combined = flow.add("DreamCacheCombineReferences", **named)
    prompts = texts(flow, base, "a photo of a cat on a beach at sunset")
    latent = empty(flow, base)
    flow.column()
    applied = flow.add(
        "DreamCacheApply",
        model=base.model,
        adapters=adapters,
        reference=combined["reference"],
        image_guidance=1.0,
    )
    flow.column()
    return saved(flow, base, sampler(flow, base, applied["model"], prompts, latent))


def several_views_demo() -> Workflow:
    """Three images of one subject of the demo model."""
    flow = Workflow("DreamCache 8 - Several photos of one subject (no download)")
    flow.column()
    flow.note(
        "What this is",
        "### Several views, one subject\n**views** of DreamCache Demo Reference (an advanced input) makes a batch of three images of the same "
        "subject. **Encode Reference** makes one reference of a batch, and the new image looks at all of it. Images that do not fit into one "
        "batch go through an Encode Reference each and **Combine References**: see *Several photos of one subject (SD 1.5)*.\n\nThe demo "
        "model draws it: nothing has to be downloaded.",
    )
    flow.column()
    base = demo(flow)
    subject = flow.add(
        "DreamCacheDemoReference", title="The subject", shape="ghost", seed=1, views=3
    )
    flow.column()
    model = from_photo(flow, base, subject["image"], subject["mask"])["model"]
    flow.column()
    prompts = texts(flow, base, "a ghost on the grass, left")
    latent = empty(flow, base, images=4)
    with_and_without(flow, base, model, prompts, latent)
    return flow


def with_lora() -> Workflow:
    """A photo's subject in a LoRA's style."""
    flow = Workflow("DreamCache 8 - With a LoRA (SD 1.5)")
    flow.column()
    flow.note(
        "What this is",
        "### The subject in another style\nThe LoRA decides the style, the photo the subject. **DreamCache from Photo** comes after **Load "
        "LoRA**, so that the reference is looked at with the LoRA, too. Choose your LoRA, and put its trigger words into the prompt.",
    )
    flow.column()
    plain = checkpoint(flow, SD15)
    image = flow.add("LoadImage", title="Your photo", width_px=340, image="example.png")
    flow.column()
    lora = flow.add("LoraLoader", model=plain.model, clip=plain.clip, lora_name="choose your LoRA")
    base = plain._replace(model=lora["MODEL"], clip=lora["CLIP"])
    flow.column()
    photo = from_photo(flow, base, image["IMAGE"], image["MASK"])
    prompts = texts(flow, base, "a drawing of a cat on a beach at sunset")
    latent = empty(flow, base)
    flow.column()
    return saved(flow, base, sampler(flow, base, photo["model"], prompts, latent))


def with_controlnet() -> Workflow:
    """A subject in the outlines of another image."""
    flow = Workflow("DreamCache 8 - With a ControlNet (SD 1.5)")
    flow.column()
    flow.note(
        "What this is",
        "### The subject, laid out by another image\nThe ControlNet takes the outlines of **The layout**, the reference takes care of the "
        "subject. Lower the ControlNet's **strength** where the subject loses its own outlines.",
    )
    flow.column()
    base = checkpoint(flow, SD15)
    subject = flow.add("LoadImage", title="Your subject", width_px=340, image="example.png")
    layout = flow.add("LoadImage", title="The layout", width_px=340, image="example.png")
    flow.column()
    photo = from_photo(flow, base, subject["IMAGE"], subject["MASK"])
    outlines = flow.add("Canny", image=layout["IMAGE"])["IMAGE"]
    network = flow.add(
        "ControlNetLoader",
        width_px=420,
        control_net_name="control_v11p_sd15_canny_fp16.safetensors",
    )
    prompts = texts(flow, base, "a photo of a cat on a beach at sunset")
    latent = empty(flow, base)
    flow.column()
    guided = flow.add(
        "ControlNetApplyAdvanced",
        positive=prompts.prompt["CONDITIONING"],
        negative=prompts.negative["CONDITIONING"],
        control_net=network["CONTROL_NET"],
        image=outlines,
    )
    flow.column()
    positive, negative = guided["positive"], guided["negative"]
    drawn = sampler(
        flow, base, photo["model"], prompts, latent, positive=positive, negative=negative
    )
    return saved(flow, base, drawn)
