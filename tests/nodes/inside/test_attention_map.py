"""The node that shows where a new image looks in its reference."""

import pytest
import torch
from tiny import (
    CORE,
    CallCounter,
    apply,
    encode,
    make_image,
    make_model,
    make_text,
    run,
    sample,
)

import nodes as comfy_nodes

SIDE = 128


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return make_model("sd15")


def noise(images, width):
    return torch.randn(images, 4, 16, width, generator=torch.Generator().manual_seed(4))


def look(model, *, latent=None, image=None, **inputs):
    samples = torch.zeros(1, 4, 16, 16) if latent is None else latent
    return run(
        "DreamCacheAttentionMap",
        model=model,
        positive=make_text(model, 1),
        latent={"samples": samples},
        reference_image=make_image(0) if image is None else image,
        **inputs,
    )[0]


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_it_draws_the_reference_and_what_the_image_sees(kind):
    model = apply(make_model(kind))
    drawn = look(model, latent=noise(2, 24))
    assert drawn.shape == (2, SIDE, SIDE + SIDE * 24 // 16, 3)
    assert 0 <= float(drawn.min()) < float(drawn.max()) <= 1
    assert not torch.equal(drawn[0], drawn[1])


def test_it_needs_one_call_and_leaves_the_model_as_it_was(model):
    applied = apply(model)
    before = sample(applied)
    with CallCounter(model) as counter:
        look(applied, latent=noise(2, 16))
    assert counter.rows == [2]
    assert torch.equal(sample(applied), before)
    modules = model.model.diffusion_model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_a_point_is_a_mask_of_one_token(model):
    applied = apply(model)
    mask = torch.zeros(1, 16, 16)
    mask[:, 4, 8] = 1
    by_mask = look(applied, mask=mask)
    assert torch.equal(look(applied, point_x=0.5, point_y=0.25), by_mask)
    assert not torch.equal(look(applied, point_x=1.0, point_y=1.0), by_mask)
    assert torch.equal(look(applied, mask=torch.zeros(1, 64, 64)), look(applied))


def test_every_applied_reference_can_be_asked_for(model):
    one, other = encode(model), encode(model, image=make_image(1, batch=2))
    both = apply(apply(model, reference=one), reference=other, scale=0.5)
    assert look(both).shape[2] == 2 * SIDE
    shown = look(both, image=make_image(1, batch=2), reference_number=2)
    assert shown.shape[2] == 3 * SIDE


def test_ends_of_the_run_can_be_looked_at(model):
    applied = apply(model)
    first, last = (look(applied, percent=percent) for percent in (0.0, 1.0))
    assert bool(first.isfinite().all() and last.isfinite().all())
    assert not torch.equal(first, last)


def test_the_centre_of_the_demo_models_house_looks_at_the_house():
    model, clip, vae, adapters = run("DreamCacheDemoModel")
    image = run("DreamCacheDemoReference", shape="house", seed=4)[0]
    reference = run("DreamCacheEncode", model=model, vae=vae, clip=clip, image=image)[0]
    applied = run("DreamCacheApply", model=model, adapters=adapters, reference=reference)[0]
    encode_text = comfy_nodes.NODE_CLASS_MAPPINGS["CLIPTextEncode"]().encode
    text = encode_text(clip, "a big house in the snow")[0]
    latent = {"samples": vae.encode(image)}  # an image that surely shows the subject, in the middle
    drawn = run(
        "DreamCacheAttentionMap",
        model=applied,
        positive=text,
        latent=latent,
        reference_image=image,
        point_x=0.5,
        point_y=0.5,
    )[0]
    side = image.shape[1]
    light = (drawn[0, :, :side] / image[0].clamp(min=0.01)).mean(dim=-1)
    is_white = image[0].amin(dim=-1) > 0.99
    middle = slice(side // 2 - 12, side // 2 + 12)
    assert not bool(is_white[middle, middle].any())
    assert float(light[middle, middle].mean()) > 1.5 * float(light[is_white].mean())


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"reference_number": 2}, "reference_number is 2, but the model has 1 references"),
        (
            {"point_x": 0.5},
            "Only one of point_x and point_y",
        ),
        (
            {"mask": torch.ones(1, 16, 16), "point_x": 0.5, "point_y": 0.5},
            "Both a mask and a point",
        ),
        ({"mask": torch.ones(3, 16, 16)}, "each of the 1 images, got 3"),
        ({"image": make_image(0, batch=2)}, "1 images that the reference was encoded from"),
    ],
)
def test_what_cannot_be_shown_is_refused(model, inputs, expected):
    with pytest.raises(CORE.InputError, match=expected):
        look(apply(model), **inputs)


def test_a_percent_at_which_the_reference_does_not_act_is_refused(model):
    applied = apply(model, start_percent=0.25, end_percent=0.75)
    for percent in (0.0, 0.2, 0.75, 1.0):
        with pytest.raises(CORE.InputError, match=r"acts from 0\.25 to 0\.75.*at percent"):
            look(applied, percent=percent)
    for percent in (0.25, 0.5, 0.74):
        assert bool(look(applied, percent=percent).isfinite().all())
    early, late = apply(model, end_percent=0.5), apply(model, start_percent=0.5)
    assert bool(
        look(early, percent=0.0).isfinite().all() and look(late, percent=1.0).isfinite().all()
    )


def test_without_a_reference_there_is_nothing_to_look_at(model):
    with pytest.raises(CORE.StateError, match=r"Attention Map needs.*Apply DreamCache"):
        look(model)
    with pytest.raises(CORE.InputError, match="strength of 0"):
        look(apply(model, scale=0.0))
