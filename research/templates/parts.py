"""What many of the workflows have in common."""

from typing import Any, NamedTuple

from dreamcache_core.demo.gallery import GUIDANCE_SCALE, STEPS
from dreamcache_core.demo.world.world import IMAGE_SIZE

from .workflow import Node, Output, Workflow

SD15, SDXL = "v1-5-pruned-emaonly-fp16.safetensors", "sd_xl_base_1.0.safetensors"
FROM_MODEL = "from this model"
WITH, WITHOUT = "With the reference", "Without"
SD21 = "v2-1_512-ema-pruned.safetensors"

SCENES = (
    "on the grass, on the beach, at night, in the snow, in the desert, in the sea, in front of a wall, in a room, in the kitchen, "
    "in the city, in the forest"
)


class Base(NamedTuple):
    """A loaded model, and how one samples with it."""

    model: Output
    clip: Output
    vae: Output
    size: int
    sampling: dict[str, Any]
    photo: dict[str, Any]
    """Further inputs of DreamCache from Photo."""


class Texts(NamedTuple):
    """What is drawn, and on what."""

    prompt: Node
    negative: Node


def demo(flow: Workflow) -> Base:
    """The demo model."""
    node = flow.add("DreamCacheDemoModel")
    return Base(
        node["model"],
        node["clip"],
        node["vae"],
        IMAGE_SIZE,
        {
            "steps": STEPS,
            "cfg": GUIDANCE_SCALE,
            "sampler_name": "euler_ancestral",
            "scheduler": "sgm_uniform",
        },
        {"loaded_adapters": node["adapters"], "size": IMAGE_SIZE},
    )


def checkpoint(flow: Workflow, name: str) -> Base:
    """A checkpoint of Stable Diffusion, with adapters that are made from it."""
    node = flow.add("CheckpointLoaderSimple", width_px=340, ckpt_name=name)
    sampling = {"steps": 30, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    return Base(
        node["MODEL"],
        node["CLIP"],
        node["VAE"],
        1024 if name == SDXL else 512,
        sampling,
        {"adapters": FROM_MODEL},
    )


def from_photo(flow: Workflow, base: Base, image: Output, mask: Output) -> Node:
    """DreamCache from Photo for a model."""
    return flow.add(
        "DreamCacheFromPhoto",
        model=base.model,
        vae=base.vae,
        clip=base.clip,
        image=image,
        mask=mask,
        **base.photo,
    )


def encoded(flow: Workflow, base: Base, image: Output, mask: Output, adapters: Output) -> Output:
    """A subject, encoded for adapters."""
    return flow.add(
        "DreamCacheEncode",
        model=base.model,
        vae=base.vae,
        clip=base.clip,
        image=image,
        mask=mask,
        adapters=adapters,
    )["reference"]


def texts(flow: Workflow, base: Base, prompt: str, negative: str = "") -> Texts:
    """Prompt and negative prompt."""
    return Texts(
        flow.add("CLIPTextEncode", title="Prompt", clip=base.clip, text=prompt),
        flow.add("CLIPTextEncode", title="Negative prompt", clip=base.clip, text=negative),
    )


def empty(flow: Workflow, base: Base, images: int = 1) -> Output:
    """The size and number of new images."""
    size: dict[str, Any] = {"width": base.size, "height": base.size}
    return flow.add("EmptyLatentImage", **size, batch_size=images)["LATENT"]


def sampler(
    flow: Workflow, base: Base, model: Output, prompts: Texts, latent: Output, **more: Any
) -> Node:
    """A KSampler with the model's settings."""
    given: dict[str, Any] = {"model": model, "latent_image": latent, **base.sampling}
    ends: dict[str, Any] = {
        "positive": prompts.prompt["CONDITIONING"],
        "negative": prompts.negative["CONDITIONING"],
    }
    return flow.add("KSampler", **given, **ends | more)


def decoded(flow: Workflow, base: Base, *samplers: Node) -> list[Output]:
    """A column of decoders."""
    flow.column()
    return [
        flow.add("VAEDecode", width_px=220, samples=one["LATENT"], vae=base.vae)["IMAGE"]
        for one in samplers
    ]


def saved(flow: Workflow, base: Base, sampled: Node) -> Workflow:
    """Decode and save; the workflow is complete."""
    (shown,) = decoded(flow, base, sampled)
    flow.column()
    flow.add("SaveImage", width_px=480, images=shown, filename_prefix="dreamcache")
    return flow


def with_and_without(
    flow: Workflow, base: Base, model: Output, prompts: Texts, latent: Output, **more: Any
) -> Node:
    """Show what a model with references draws, and what the plain one draws from the same noise; return the first."""
    seed = flow.add("PrimitiveInt", title="Seed of both", value=0)
    flow.column()
    both = [
        sampler(flow, base, drawing, prompts, latent, title=title, seed=seed["INT"], **more)
        for drawing, title in ((model, WITH), (base.model, WITHOUT))
    ]
    images = decoded(flow, base, *both)
    flow.column()
    shown = [
        flow.add("PreviewImage", title=title, width_px=420, images=image)
        for title, image in zip((WITH, WITHOUT), images, strict=True)
    ]
    return shown[0]
