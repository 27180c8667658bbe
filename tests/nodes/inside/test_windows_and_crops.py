"""Nodes that let the model see some images of a batch, or a part of an image, at a time."""

import importlib
import logging

import comfy.samplers
import comfy.utils
import comfyui_version
import pytest
import torch
from test_meetings import add_nested_difference, seen_regions
from tiny import (
    CallCounter,
    apply,
    assert_close,
    encode,
    make_adapters,
    make_model,
    make_text,
    run,
    sample,
)

# with as many noise levels as images even ComfyUI 0.3.64 finds the step of a window of images
BATCH, STEPS = 4, 3
SCHEDULES = {
    "static": {"context_schedule": "standard_static", "context_overlap": 1},
    "uneven": {"context_schedule": "batched", "context_length": 3},
    "looped": {
        "context_schedule": "looped_uniform",
        "context_overlap": 1,
        "closed_loop": True,
        "context_stride": 2,
    },
    # ComfyUI 0.33 adds an image in front: as many images as the batch has, in another order
    "looped, all but one": {
        "context_schedule": "looped_uniform",
        "context_length": 3,
        "context_overlap": 1,
        "closed_loop": True,
    },
}


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        model = make_model("sd15")
        return model, make_adapters(model), encode(model)


def windows(model, **inputs):
    """The node Context Windows (Manual); the U-Net treats images of a batch apart, so it changes nothing."""
    node = importlib.import_module("comfy_extras.nodes_context_windows").ContextWindowsManualNode
    defaults = {
        item.id: item.default
        for item in node.define_schema().inputs
        if getattr(item, "default", None) is not None
    }
    given = {"context_length": 2, "context_overlap": 0, "context_schedule": "batched", **inputs}
    return node.execute(model, **{**defaults, **given}).result[0]


def masks_of_four():
    masks = torch.zeros(BATCH, 128, 128)
    for image in range(BATCH):
        masks[image, :, 32 * image : 32 * (image + 1)] = 1
    return masks


def texts_of_four(model, seed):
    states = torch.cat([make_text(model, seed + image)[0][0] for image in range(BATCH)])
    return [[states, {}]]


def assert_windows_change_nothing(applied, schedule="static"):
    inputs = {"batch": BATCH, "steps": STEPS}
    windowed = windows(applied, **SCHEDULES[schedule])
    with CallCounter(applied) as counter:
        ours = sample(windowed, **inputs)
    assert len(counter.rows) > STEPS
    assert_close(ours, sample(applied, **inputs), 1e-4)


# --- windows of images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [*((schedule, {}) for schedule in SCHEDULES), ("static", {"guidance": "joint"})],
)
def test_region_masks_of_images_follow_them_into_context_windows(parts, schedule, settings):
    applied = apply(*parts, mask=masks_of_four(), **settings)
    assert_windows_change_nothing(applied, schedule)


def test_region_masks_of_two_references_follow_images_into_context_windows(parts):
    model, adapters, reference = parts
    first = apply(model, adapters, reference, mask=masks_of_four())
    other = encode(model, 1), masks_of_four().flip(0)
    assert_windows_change_nothing(apply(first, adapters, other[0], mask=other[1]))


@pytest.mark.parametrize("schedule", ["static", "looped, all but one"])
def test_nested_predictions_in_context_windows_add_nothing(parts, schedule):
    applied = apply(*parts, image_guidance=3.0)
    nested = add_nested_difference(windows(applied, **SCHEDULES[schedule]), "cond")
    inputs = {"batch": BATCH, "steps": STEPS}
    assert_close(sample(nested, **inputs), sample(applied, **inputs), 1e-4)


@pytest.mark.parametrize("schedule", ["static", "looped, all but one"])
def test_texts_of_the_guider_follow_their_images_into_context_windows(parts, schedule):
    model = parts[0]
    applied = apply(*parts)
    noise = torch.randn((BATCH, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "normal", STEPS
    )

    def guided(model):
        guider = run(
            "DreamCacheGuider",
            model=model,
            positive=texts_of_four(parts[0], 10),
            negative=texts_of_four(parts[0], 20),
            unconditional=texts_of_four(parts[0], 30),
        )[0]
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(
            noise, torch.zeros_like(noise), euler, sigmas, seed=1, disable_pbar=True
        )

    with CallCounter(model) as counter:
        ours = guided(windows(applied, **SCHEDULES[schedule]))
    assert len(counter.rows) > STEPS
    assert_close(ours, guided(applied), 1e-4)


if comfyui_version.__version__ == "0.3.64":  # gives every window the first texts, whosever they are
    del test_texts_of_the_guider_follow_their_images_into_context_windows


# --- windows in an image -----------------------------------------------------------------------------------------


def left_half():
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    return mask


@pytest.mark.parametrize("axis", [2, 3])
def test_a_region_mask_is_cropped_with_context_windows_in_an_image(parts, monkeypatch, axis):
    mask = left_half() if axis == 3 else left_half().mT
    windowed = windows(apply(*parts, mask=mask), dim=axis, context_length=8)
    seen = seen_regions(monkeypatch)
    sample(windowed, steps=1)
    shares = [round(region.mean().item(), 3) for region, _ in seen]
    half = len(shares) // 2
    assert set(shares[:half]) == {1}
    # ComfyUI 0.33 adds a row or column of the first half in front of the second
    assert set(shares[half:]) in ({0}, {0.111})


@pytest.mark.parametrize("axis", [2, 3])
def test_nested_predictions_in_windows_of_an_image_add_nothing(parts, axis):
    windowed = windows(apply(*parts, image_guidance=3.0), dim=axis, context_length=8)
    nested = add_nested_difference(windowed, "cond")
    assert_close(sample(nested, steps=2), sample(windowed, steps=2), 1e-4)


# --- crops -------------------------------------------------------------------------------------------------------

CROPS = [(slice(top, top + 8), slice(left, left + 8)) for top in (0, 8) for left in (0, 4, 8)]


def add_crops(model, differences=None, change=lambda crop: crop):
    """What sliding-window guidance does: predictions of crops, one after another, against the whole one."""
    patched = model.clone()

    def post_cfg(args):
        for rows, columns in CROPS:
            crop = change(args["input"][..., rows, columns])
            rest = (args["sigma"], args["model_options"])
            again = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], crop, *rest)[0]
            if differences is not None:
                differences.append(args["cond_denoised"][..., rows, columns] - again)
        return args["denoised"]

    patched.set_model_sampler_post_cfg_function(post_cfg)
    return patched


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_predictions_of_crops_are_shifted_as_whole_ones_are(parts, caplog, batch, scale):
    differences = {}
    for image_guidance in (1.0, scale):
        differences[image_guidance] = seen = []
        applied = apply(*parts, image_guidance=image_guidance)
        with caplog.at_level(logging.WARNING):
            sample(add_crops(applied, seen), steps=1, batch=batch)
    for shifted, plain in zip(differences[scale], differences[1.0], strict=True):
        assert_close(shifted, plain, 1e-4)
    assert not caplog.text


@pytest.mark.parametrize("batch", [1, 2])
def test_a_region_mask_is_cropped_with_the_latents(parts, monkeypatch, batch):
    masks = torch.cat([left_half(), left_half().flip(-1)])[:batch]
    cropping = add_crops(apply(*parts, mask=masks, image_guidance=1.0))
    seen = seen_regions(monkeypatch)
    sample(cropping, steps=1, batch=batch)
    regions = [region for region, _ in seen]
    per_call = len(regions) // (1 + len(CROPS))
    whole = regions[0][:batch]
    for (rows, columns), region in zip(CROPS, regions[per_call::per_call], strict=True):
        assert torch.equal(region, whole[:, rows, columns])


def test_a_prediction_of_one_image_of_a_batch_has_its_region_and_its_shift(parts, monkeypatch):
    masks = torch.cat([left_half(), left_half().flip(-1)])
    applied = apply(*parts, mask=masks)
    differences = []

    def post_cfg(args):
        for image in (1, 0):
            rest = (args["input"][image : image + 1], args["sigma"][:1], args["model_options"])
            again = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], *rest)[0]
            differences.append((args["cond_denoised"][image] - again[0]).abs().max().item())
        return args["denoised"]

    applied.set_model_sampler_post_cfg_function(post_cfg)
    seen = seen_regions(monkeypatch)
    sample(applied, steps=1, batch=2)
    assert max(differences) < 1e-3
    assert torch.equal(seen[-1][0], seen[0][0][:1])


def test_crops_that_are_no_part_of_the_latents_are_said_to_be_off(parts, caplog):
    changed = add_crops(apply(*parts, mask=left_half()), change=lambda crop: crop * 0.5)
    with caplog.at_level(logging.WARNING):
        sample(changed, steps=2)
    assert caplog.text.count("mask of Apply DreamCache") == 1
    assert caplog.text.count("image_guidance is missing") == 1
    caplog.clear()
    unguided = add_crops(apply(*parts, image_guidance=1.0), change=lambda crop: crop * 0.5)
    with caplog.at_level(logging.WARNING):
        sample(unguided, steps=1)
    assert not caplog.text


def tiled(crops_conditions):
    """A function wrapper that runs tiles, as tiled diffusion packs do; some crop what has the size of the latents too."""

    def wrapper(apply_model, args):
        x, total = args["input"], torch.zeros_like(args["input"])
        for rows, columns in (CROPS[i] for i in (0, 2, 3, 5)):
            tile = {
                key: value[..., rows, columns]
                if crops_conditions and isinstance(value, torch.Tensor) and value.ndim == x.ndim
                else value
                for key, value in args["c"].items()
            }
            out = apply_model(x[..., rows, columns], args["timestep"], **tile)
            total[..., rows, columns] = out
        return total

    return wrapper


@pytest.mark.parametrize("crops_conditions", [True, False])
def test_a_region_mask_in_tiles_is_cropped_or_said_to_be_off(
    parts, monkeypatch, caplog, crops_conditions
):
    applied = apply(*parts, mask=left_half())
    applied.set_model_unet_function_wrapper(tiled(crops_conditions))
    seen = seen_regions(monkeypatch)
    with caplog.at_level(logging.WARNING):
        sample(applied, steps=2)
    assert caplog.text.count("mask of Apply DreamCache") == (not crops_conditions)
    if crops_conditions:
        assert seen[0][0].all()
        assert not seen[-1][0].any()
