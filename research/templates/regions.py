"""Two subjects in one image, each in its half."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from .parts import SD15, Base, Texts, checkpoint, demo, empty, sampler, saved, with_and_without
from .workflow import Output, Workflow

ABOUT = (
    "### Two subjects, one image\nEach **Apply DreamCache** puts one subject into its **region**: the left half and the right half. "
    "Each prompt holds for its half too (*Conditioning (Set Mask)*), so that no subject gets the other's name.\n\nOther regions: change "
    "width and x, or take a mask that you painted. A third subject: one more of each."
)


class Subject(NamedTuple):
    """Who is to be in a half."""

    image: Output
    mask: Output
    prompt: str


def _references(
    flow: Workflow, base: Base, adapters: Output, subjects: Iterable[Subject]
) -> list[Output]:
    """Encode both."""
    return [
        flow.add(
            "DreamCacheEncode",
            model=base.model,
            vae=base.vae,
            clip=base.clip,
            image=subject.image,
            mask=subject.mask,
            adapters=adapters,
        )["reference"]
        for subject in subjects
    ]


def _halves(flow: Workflow, size_px: int) -> list[Output]:
    """Masks of the left half and the right half."""
    size: dict[str, Any] = {"width": size_px, "height": size_px}
    nothing = flow.add("SolidMask", title="Empty mask", value=0.0, **size)
    half = flow.add(
        "SolidMask", title="Mask of half the image", value=1.0, **(size | {"width": size_px // 2})
    )
    flow.column()
    return [
        flow.add(
            "MaskComposite",
            title=title,
            destination=nothing["MASK"],
            source=half["MASK"],
            x=x,
            y=0,
            operation="add",
        )["MASK"]
        for title, x in (("Left half", 0), ("Right half", size_px // 2))
    ]


def _applied(
    flow: Workflow, model: Output, adapters: Output, reference: Output, region: Output
) -> Output:
    """Put a subject into its region."""
    return flow.add(
        "DreamCacheApply",
        model=model,
        adapters=adapters,
        reference=reference,
        image_guidance=1.0,
        mask=region,
    )["model"]


def _two_subjects(
    flow: Workflow, base: Base, adapters: Output, subjects: tuple[Subject, Subject]
) -> tuple[Output, Texts, Output]:
    """From two subjects to the model, texts and latent for the sampler."""
    references = _references(flow, base, adapters, subjects)
    halves = _halves(flow, base.size)
    prompts = [
        flow.add("CLIPTextEncode", title="Prompt", clip=base.clip, text=subject.prompt)
        for subject in subjects
    ]
    flow.column()
    model = _applied(flow, base.model, adapters, references[0], halves[0])
    texts = [
        flow.add(
            "ConditioningSetMask",
            conditioning=prompt["CONDITIONING"],
            mask=half,
            set_cond_area="default",
        )["CONDITIONING"]
        for prompt, half in zip(prompts, halves, strict=True)
    ]
    flow.column()
    model = _applied(flow, model, adapters, references[1], halves[1])
    both = flow.add("ConditioningCombine", conditioning_1=texts[0], conditioning_2=texts[1])
    negative = flow.add("CLIPTextEncode", title="Negative prompt", clip=base.clip, text="")
    return model, Texts(both, negative), empty(flow, base)


def two_subjects() -> Workflow:
    """Of two photos."""
    flow = Workflow("DreamCache 4 - Two subjects in regions (SD 1.5)")
    flow.column()
    flow.note("What this is", ABOUT)
    flow.column()
    base = checkpoint(flow, SD15)
    photos = [
        flow.add("LoadImage", title=title, width_px=340, image="example.png")
        for title in ("Left subject", "Right subject")
    ]
    flow.column()
    adapters = flow.add("DreamCacheModelAdapters", model=base.model, clip=base.clip)["adapters"]
    flow.column()
    left, right = (
        Subject(photo["IMAGE"], photo["MASK"], f"a photo of a {name} on a beach at sunset")
        for photo, name in zip(photos, ("cat", "dog"), strict=True)
    )
    model, prompts, latent = _two_subjects(flow, base, adapters, (left, right))
    flow.column()
    return saved(flow, base, sampler(flow, base, model, prompts, latent))


def two_subjects_demo() -> Workflow:
    """Of the demo."""
    flow = Workflow("DreamCache 4 - Two subjects in regions (no download)")
    flow.column()
    flow.note("What this is", f"{ABOUT}\n\nThe demo model draws it: nothing has to be downloaded.")
    flow.column()
    base = demo(flow)
    drawn = [
        flow.add("DreamCacheDemoReference", title=title, shape=shape, seed=seed)
        for title, shape, seed in (("Left subject", "rocket", 1), ("Right subject", "star", 3))
    ]
    flow.column()
    left, right = (
        Subject(subject["image"], subject["mask"], f"a {name} on the grass, {side}")
        for subject, name, side in zip(drawn, ("rocket", "star"), ("left", "right"), strict=True)
    )
    adapters = base.photo["loaded_adapters"]
    with_and_without(flow, base, *_two_subjects(flow, base, adapters, (left, right)))
    return flow
