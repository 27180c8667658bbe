"""Where an image looks in a reference: the adapters' softmax, read from a real U-Net."""

import dataclasses

import pytest
import torch
from tiny_diffusers import random_adapters, random_unet

from dreamcache_core import InputError, ReferenceUse, StateError, capture_reference, inject
from dreamcache_core.method.attention_maps import (
    OUTSIDE,
    UNSEEN,
    AttentionMaps,
    attention_maps,
    draw_attention,
    record_hidden_states,
)
from dreamcache_core.method.backends import layout_of
from dreamcache_core.method.blending import prepare_layer

pytestmark = pytest.mark.diffusers

REFERENCE_SIDE, PIXELS = 8, 64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unet():
    return random_unet(48).requires_grad_(False)


@pytest.fixture(scope="module")
def use(unet):
    cache = capture_reference(
        unet, randn(2, 4, REFERENCE_SIDE, REFERENCE_SIDE, seed=8), 1, randn(1, 5, 48, seed=9)
    )
    return ReferenceUse(cache, random_adapters(layout_of(unet)))


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, PIXELS, PIXELS, 3, generator=torch.Generator().manual_seed(3))


def look(unet, use, shown, region=None, *, height=8, width=16, images=2):
    layers = use.adapters.layers
    with record_hidden_states(unet, layers) as states, inject(unet, use):
        unet(randn(images, 4, height, width, seed=1), 500, randn(images, 5, 48, seed=2))
    references = {
        layer: prepare_layer(
            use, layer, use.adapters[layer], device=torch.device("cpu"), dtype=torch.float32
        )
        for layer in layers
    }
    maps = attention_maps(states, references, use.reference, shown, region)
    return maps, states


def textbook(states, use, layer):
    """METHOD.md section 4 as it reads: the softmax of one layer, (images, tokens, reference tokens)."""
    adapter, heads = use.adapters[layer], states[layer].heads
    tokens = use.reference.features[layer].flatten(2).transpose(1, 2).flatten(0, 1)
    query, key = adapter.to_q(adapter.norm(states[layer].hidden_states)), adapter.to_k(tokens)
    query, key = query.unflatten(-1, (heads, -1)), key.unflatten(-1, (heads, -1))
    logits = torch.einsum("iqhc,khc->ihqk", query, key) / query.shape[-1] ** 0.5
    return logits.softmax(dim=-1).mean(dim=1)


def test_the_maps_are_the_adapters_softmax_of_the_finest_layers(unet, use, images):
    maps, states = look(unet, use, images)
    finest = max(state.hidden_states.shape[1] for state in states.values())
    layers = [name for name, state in states.items() if state.hidden_states.shape[1] == finest]
    assert 0 < len(layers) < len(states)
    expected = torch.stack([textbook(states, use, layer) for layer in layers])
    height, width = use.reference.features[layers[0]].shape[-2:]
    shares = expected.mean(dim=2).mean(dim=0) * 2 * height * width
    enlarged = torch.nn.functional.interpolate(
        shares.unflatten(1, (2, height, width)), size=(PIXELS, PIXELS), mode="bilinear"
    )
    torch.testing.assert_close(maps.looked_at, enlarged, rtol=1e-4, atol=1e-5)
    pooled = torch.nn.functional.avg_pool2d(images.movedim(-1, 1), PIXELS // height)
    colours = pooled.movedim(1, -1).flatten(0, 2)
    seen = colours[expected.argmax(dim=-1)].mean(dim=0)
    torch.testing.assert_close(maps.seen.flatten(1, 2), seen, rtol=1e-4, atol=1e-5)


def test_attention_adds_up_to_one(unet, use, images):
    maps, _ = look(unet, use, images)
    assert maps.looked_at.shape == (2, 2, PIXELS, PIXELS)
    assert maps.looked_at.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1], rel=0.05)


def test_a_region_asks_about_its_places_only(unet, use, images):
    left = torch.zeros(1, 8, 16)
    left[..., :8] = 1
    everywhere, _ = look(unet, use, images)
    one, _ = look(unet, use, images, left)
    other, _ = look(unet, use, images, 1 - left)
    assert not torch.allclose(one.looked_at, other.looked_at, rtol=1e-3)
    halves = (one.looked_at + other.looked_at) / 2
    torch.testing.assert_close(halves, everywhere.looked_at, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.seen, everywhere.seen)


def test_the_background_is_looked_at_as_what_it_was_reduced_to(unet, use, images):
    masks = {
        layer: torch.zeros(2, *feature.shape[-2:], dtype=torch.bool)
        for layer, feature in use.reference.features.items()
    }
    for mask in masks.values():
        mask[:, :, : max(1, mask.shape[-1] // 2)] = True
    masked = dataclasses.replace(use.reference, masks=masks)
    maps, _ = look(unet, ReferenceUse(masked, use.adapters), images)
    subject, background = maps.looked_at.chunk(2, dim=-1)
    assert float(subject.mean() + background.mean()) == pytest.approx(2, rel=0.05)
    assert float(background[..., PIXELS // REFERENCE_SIDE :].mean()) < 0.2
    # the places of a group have equal parts; beside the subject maps are smoothed into each other
    beyond = background[..., 2 * PIXELS // REFERENCE_SIDE :, 2 * PIXELS // REFERENCE_SIDE :]
    assert float(beyond[0, 0].std()) < 0.1 * float(subject[0, 0].std())


def test_no_hook_is_left_behind(unet, use, images):
    look(unet, use, images)
    with pytest.raises(ZeroDivisionError), record_hidden_states(unet, use.adapters.layers):
        _ = 1 / 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@pytest.mark.parametrize(
    ("chosen", "given"),
    [
        (lambda p: p[:1], "given 1 of 64 x 64"),
        (lambda p: p[:, :32], "given 2 of 64 x 32"),
    ],
)
def test_other_images_are_refused(unet, use, images, chosen, given):
    with pytest.raises(InputError, match=f"2 images.*{given}.*Encode Reference"):
        look(unet, use, chosen(images))


def test_an_empty_region_is_refused(unet, use, images):
    with pytest.raises(InputError, match="mask is empty"):
        look(unet, use, images, torch.zeros(1, 8, 16))


def test_merged_tokens_are_refused(unet, use, images):
    _, states = look(unet, use, images)
    merged = {
        layer: dataclasses.replace(state, hidden_states=state.hidden_states[:, ::2])
        for layer, state in states.items()
    }
    with pytest.raises(StateError, match="token merging"):
        attention_maps(merged, dict.fromkeys(merged), use.reference, images)  # pyright: ignore


def test_a_pass_outside_the_recording_is_noticed(use, images):
    with pytest.raises(StateError, match="record_hidden_states"):
        attention_maps({}, dict.fromkeys(use.adapters.layers), use.reference, images)  # pyright: ignore


def test_drawing_lights_what_is_looked_at_and_darkens_what_is_not_asked_about():
    looked_at = torch.zeros(1, 1, 8, 8)
    looked_at[..., :4] = 2
    region = torch.zeros(1, 4, 8)
    region[..., 4:] = 1
    drawn = draw_attention(
        AttentionMaps(looked_at, torch.ones(1, 4, 8, 3)), torch.ones(1, 8, 8, 3), region
    )
    assert drawn.shape == (1, 8, 8 + 16, 3)
    assert drawn[0, 4, [0, 7], 0].tolist() == pytest.approx([1, UNSEEN])
    assert drawn[0, 4, [8, 23], 0].tolist() == pytest.approx([OUTSIDE, 1])
