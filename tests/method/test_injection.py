"""Adapters in a real U-Net: exactly nothing where they are off, the formula where they are on."""

import copy
import math

import pytest
import torch
from tiny_diffusers import random_adapters, random_unet, sdxl_unet
from torch import nn

from dreamcache_core import (
    AdapterInfo,
    AdapterSet,
    InputError,
    Layout,
    MismatchError,
    ReferenceCache,
    ReferenceUse,
    StateError,
    UnsupportedModelError,
    capture_reference,
    inject,
)
from dreamcache_core.method.backends import layout_of, select_sites
from dreamcache_core.method.blending import (
    LayerReference,
    blend_references,
    pool_area,
    prepare_layer,
)

pytestmark = pytest.mark.diffusers

LAYERS = 5
MIDDLE = "middle_block.1"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unet():
    return random_unet(48).requires_grad_(False)


@pytest.fixture(scope="module")
def cache(unet):
    return capture_reference(unet, randn(1, 4, 8, 8, seed=8), 1, randn(1, 5, 48, seed=9))


@pytest.fixture(scope="module")
def adapters(unet):
    return random_adapters(layout_of(unet))


@pytest.fixture(scope="module")
def use(cache, adapters):
    return ReferenceUse(cache, adapters)


def changed(use, **changes):
    settings = {name: getattr(use, name) for name in ("reference", "adapters", "scale", "mask")}
    return ReferenceUse(**{**settings, "per_row": use.per_row, **changes})


def call(unet, batch=2, height=8, width=24, **kwargs):
    x, text = randn(batch, 4, height, width, seed=1), randn(batch, 5, 48, seed=2)
    dtype = next(unet.parameters()).dtype
    return unet(x.to(dtype), 601, text.to(dtype), **kwargs).sample


@torch.no_grad()
def plain(unet, **size):
    return call(unet, **size)


@torch.no_grad()
def injected(unet, uses, *, rows=None, **size):
    with inject(unet, uses, rows=rows):
        return call(unet, **size)


def num_hooks(unet):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


# off is exactly nothing


@pytest.mark.parametrize(
    "off",
    [
        {"scale": 0.0},
        {"mask": torch.zeros(16, 16)},
        {"mask": torch.zeros(2, 5, 7)},
        {"scale": 0.0, "mask": torch.ones(4, 4)},
    ],
    ids=["scale 0", "zero mask", "zero masks of images", "scale 0 with a mask"],
)
def test_reference_that_is_off_leaves_the_output_bit_for_bit(unet, use, off):
    assert torch.equal(injected(unet, changed(use, **off)), plain(unet))


def test_no_uses_leave_the_output_bit_for_bit(unet):
    assert torch.equal(injected(unet, []), plain(unet))


def test_reference_changes_the_output_of_every_row(unet, use):
    difference = (injected(unet, use, batch=3) - plain(unet, batch=3)).abs()
    assert bool((difference.flatten(1).amax(1) > 1e-2).all())


def test_scale_below_one_differs_from_nothing_and_from_all(unet, use):
    half = injected(unet, changed(use, scale=0.5))
    assert not torch.equal(half, injected(unet, use))
    assert not torch.equal(half, plain(unet))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "rows",
    [(True, False), (False, True), (False, False), (True, True), (False, True, True), (True,)],
)
def test_rows_that_are_off_equal_the_plain_model_bit_for_bit(unet, use, rows, dtype):
    fused = changed(use, adapters=use.adapters.fuse(dtype=dtype))
    out, without = (
        injected(unet, fused, rows=rows, batch=len(rows)),
        plain(unet, batch=len(rows)),
    )
    for row, is_on in enumerate(rows):
        assert torch.equal(out[row], without[row]) is not is_on, row


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_rows_that_are_on_equal_a_batch_where_all_are(unet, use, kind):
    every = injected(unet, use, batch=3)
    some = injected(unet, use, batch=3, rows=kind([True, False, True]))
    for row in (0, 2):
        torch.testing.assert_close(some[row], every[row], rtol=1e-5, atol=1e-5)


def test_zero_mask_of_one_image_leaves_its_row(unet, use):
    mask = torch.stack([torch.zeros(8, 24), torch.ones(8, 24)])
    out, without = injected(unet, changed(use, mask=mask)), plain(unet)
    assert torch.equal(out[0], without[0])
    assert not torch.equal(out[1], without[1])


@pytest.mark.parametrize("size", [(4, 4), (8, 24), (64, 100)])
def test_mask_of_ones_equals_no_mask(unet, use, size):
    out = injected(unet, changed(use, mask=torch.ones(size)))
    torch.testing.assert_close(out, injected(unet, use), rtol=0, atol=1e-6)


# sizes and batches


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 24), (24, 8), (9, 13), (16, 16)])
def test_any_size_and_batch_runs_and_rows_are_independent(unet, use, batch, size):
    height, width = size
    left = torch.zeros(3, 5)
    left[:, :2] = 1
    region = changed(use, mask=left)
    out = injected(unet, region, batch=batch, height=height, width=width)
    assert out.shape == (batch, 4, height, width)
    assert bool(out.isfinite().all())
    assert not torch.equal(out, injected(unet, use, batch=batch, height=height, width=width))
    on = [row == batch - 1 for row in range(batch)]
    last = injected(unet, region, batch=batch, height=height, width=width, rows=on)
    without = plain(unet, batch=batch, height=height, width=width)
    assert torch.equal(last[:-1], without[:-1])
    torch.testing.assert_close(last[-1], out[-1], rtol=1e-5, atol=1e-5)


def test_reference_of_another_latent_size_fits(unet, use):
    large = capture_reference(unet, randn(1, 4, 16, 24, seed=8), 1, randn(1, 5, 48, seed=9))
    out = injected(unet, changed(use, reference=large), batch=1, height=8, width=8)
    assert out.shape == (1, 4, 8, 8)
    assert not torch.equal(out, plain(unet, batch=1, height=8, width=8))


def test_sdxl_runs_with_the_adapter_on_the_first_block_only():
    unet = sdxl_unet()
    added = {"text_embeds": randn(2, 32, seed=3), "time_ids": randn(2, 6, seed=4)}
    x, text = randn(2, 4, 8, 24, seed=1), randn(2, 5, 2048, seed=2)
    cache = capture_reference(unet, x, 1, text, unet_kwargs={"added_cond_kwargs": added})
    use = ReferenceUse(cache, random_adapters(layout_of(unet)))
    with torch.no_grad():
        without = unet(x, 601, text, added_cond_kwargs=added).sample
        with inject(unet, use, rows=[False, True]):
            assert num_hooks(unet) == 3 * len(cache.layers)
            out = unet(x, 601, text, added_cond_kwargs=added).sample
    assert torch.equal(out[0], without[0])
    assert not torch.equal(out[1], without[1])


# the formula, layer by layer

TOKENS, CHANNELS, HEADS, SIZE = 6, 12, 3, (2, 3)
TINY = Layout(48, {MIDDLE: CHANNELS})


@pytest.fixture
def states():
    """Hidden states and self-attention output of four rows."""
    return randn(4, TOKENS, CHANNELS, seed=1), randn(4, TOKENS, CHANNELS, seed=2)


def tiny_use(references=1, seed=3, masks=None, **settings):
    features = {MIDDLE: randn(references, CHANNELS, 2, 5, seed=seed)}
    cache = ReferenceCache(features, 48, (16, 40), masks=masks)
    return ReferenceUse(cache, random_adapters(TINY, seed), **settings)


def prepared(use) -> LayerReference:
    adapter = use.adapters[MIDDLE]
    return prepare_layer(use, MIDDLE, adapter, device=torch.device("cpu"), dtype=torch.float32)


def blend(states, *uses, **options):
    return blend_references(
        *states, [prepared(use) for use in uses], heads=HEADS, size=SIZE, **options
    )


def adapted(states, use):
    ref = prepared(use)
    return ref.adapter(*states, ref.key, ref.value, heads=HEADS, key_mask=ref.key_mask)


def test_scale_moves_from_the_self_attention_to_the_adapter(states):
    full = adapted(states, tiny_use())
    for scale in (-1.0, 0.25, 1.0, 2.0):
        expected = states[1] + scale * (full - states[1])
        torch.testing.assert_close(blend(states, tiny_use(scale=scale)), expected)


def test_two_uses_add_up_as_the_formula_says(states):
    mask = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.25, 1.0]])
    one, two = tiny_use(scale=0.7), tiny_use(2, seed=4, scale=1.5, mask=mask)
    own, weights = states[1], mask.flatten()[None, :, None]
    expected = own + 0.7 * (adapted(states, one) - own)
    expected = expected + 1.5 * weights * (adapted(states, two) - own)
    torch.testing.assert_close(blend(states, one, two), expected)
    torch.testing.assert_close(blend(states, two, one), expected, rtol=1e-5, atol=1e-5)


def test_tokens_outside_the_region_are_the_self_attention_bit_for_bit(states):
    mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    out, inside = blend(states, tiny_use(mask=mask)), mask.flatten().bool()
    assert torch.equal(out[:, ~inside], states[1][:, ~inside])
    torch.testing.assert_close(out[:, inside], adapted(states, tiny_use())[:, inside])


def test_region_is_row_major_and_shrinks_by_area(states):
    mask = torch.zeros(4, 6)
    mask[:2, 4:] = 1  # the top right token, of two by two pixels each
    mask[2, 0] = 1  # a quarter of the bottom left one
    own = states[1]
    weights = torch.tensor([0, 0, 1, 0.25, 0, 0])[None, :, None]
    expected = own + weights * (adapted(states, tiny_use()) - own)
    torch.testing.assert_close(blend(states, tiny_use(mask=mask)), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [((64, 64), (32, 8)), ((1000, 130), (64, 33)), ((5, 7), (7, 5)), ((9, 9), (9, 9))],
)
def test_pooling_by_area_is_torchs_own(old, new):
    maps = torch.rand((2, *old), generator=torch.Generator().manual_seed(3))
    expected = nn.functional.interpolate(maps[:, None], size=new, mode="area")[:, 0]
    torch.testing.assert_close(pool_area(maps, new), expected)
    assert torch.equal(pool_area(torch.ones(old).half(), new), torch.ones(new))
    assert torch.equal(pool_area(torch.zeros(old), new), torch.zeros(new))


@pytest.mark.parametrize("rows", [None, [1, 2], [3], [0, 1, 2, 3]])
def test_masks_of_several_images_serve_the_rows_of_their_image(states, rows):
    masks = torch.stack([torch.ones(SIZE), torch.zeros(SIZE)])
    index = None if rows is None else torch.tensor(rows)
    out = blend(states, tiny_use(mask=masks), rows=index)
    full = adapted(states, tiny_use())
    for row in range(4):  # rows 0 and 2 are of image 0, rows 1 and 3 of image 1
        if row % 2 or (rows is not None and row not in rows):
            assert torch.equal(out[row], states[1][row]), row
        else:
            torch.testing.assert_close(out[row], full[row])


def test_one_image_in_three_rows_uses_its_only_mask_in_each(states):
    mask = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    out = blend(states, tiny_use(mask=mask))
    assert torch.equal(out[:, 1:], states[1][:, 1:])
    assert bool((out[:, 0] != states[1][:, 0]).any(dim=-1).all())


def test_region_is_left_out_where_the_tokens_have_changed(states):
    merged = tuple(t[:, :4] for t in states)
    out = blend(merged, tiny_use(mask=torch.zeros(SIZE)))
    torch.testing.assert_close(out, adapted(merged, tiny_use()))


def test_rows_out_of_order_land_in_their_place(states):
    out = blend(states, tiny_use(), rows=torch.tensor([2, 0]))
    full = adapted(states, tiny_use())
    for row in (0, 2):
        torch.testing.assert_close(out[row], full[row])
    for row in (1, 3):
        assert torch.equal(out[row], states[1][row])


def test_tokens_of_several_references_are_concatenated(states):
    use = tiny_use(3)
    feature = use.reference.features[MIDDLE]
    by_hand = torch.cat([f.flatten(1).T for f in feature])[None]  # -> (1, 3 * tokens, channels)
    adapter = use.adapters[MIDDLE]
    out = adapter(*states, *adapter.project_reference(by_hand), heads=HEADS)
    torch.testing.assert_close(blend(states, use), out)


def test_each_row_has_its_own_reference_with_per_row(states):
    use = tiny_use(4, per_row=True)
    out = blend(states, use)
    for row in range(4):
        features = {MIDDLE: use.reference.features[MIDDLE][row : row + 1]}
        alone = ReferenceUse(ReferenceCache(features, 48, (16, 40)), use.adapters)
        single = tuple(t[row : row + 1] for t in states)
        torch.testing.assert_close(out[row : row + 1], blend(single, alone), rtol=1e-5, atol=1e-5)


def test_per_row_references_follow_the_chosen_rows(states):
    use = tiny_use(4, per_row=True)
    every, some = blend(states, use), blend(states, use, rows=torch.tensor([1, 3]))
    torch.testing.assert_close(some[[1, 3]], every[[1, 3]])
    assert torch.equal(some[[0, 2]], states[1][[0, 2]])


@pytest.mark.parametrize("rows", [None, [1, 2, 3]])
def test_per_row_references_serve_the_rows_in_turn(states, subject_masks, rows):
    index = None if rows is None else torch.tensor(rows)
    two = tiny_use(2, masks={MIDDLE: subject_masks[MIDDLE][:2]}, per_row=True)
    in_turn = ReferenceCache.concatenate([two.reference] * 2)
    spelt_out = ReferenceUse(in_turn, two.adapters, per_row=True)
    assert torch.equal(blend(states, two, rows=index), blend(states, spelt_out, rows=index))


@pytest.fixture
def subject_masks():
    masks = torch.zeros(4, 2, 5, dtype=torch.bool)
    for row in range(4):
        masks[row, row % 2, : row + 1] = True
    return {MIDDLE: masks}


@pytest.mark.parametrize("side", [1, 2, 3, 8])
@pytest.mark.parametrize("references", [1, 2])
def test_a_subject_that_fills_the_image_gives_the_keys_of_no_mask_bit_for_bit(references, side):
    # kernels may round by how tokens lie in memory: more so the wider the layer
    channels = 128
    adapter_set = random_adapters(Layout(48, {MIDDLE: channels}))
    features = {MIDDLE: randn(references, channels, side, side, seed=3)}
    ones = {MIDDLE: torch.ones(references, side, side, dtype=torch.bool)}
    without, masked = (
        prepared(ReferenceUse(ReferenceCache(features, 48, (16, 16), masks=masks), adapter_set))
        for masks in (None, ones)
    )
    assert torch.equal(masked.key, without.key)
    assert torch.equal(masked.value, without.value)


def test_subject_mask_equals_all_keys_with_the_backgrounds_averaged(states, subject_masks):
    gathered = prepared(tiny_use(4, masks=subject_masks))
    assert gathered.key.shape == (1, 1 + 2 + 3 + 4 + 4, CHANNELS)
    ref = prepared(tiny_use(4))
    key, value = ref.key.clone(), ref.value.clone()
    bias = torch.zeros(40)
    for image, mask in enumerate(subject_masks[MIDDLE]):
        background = image * 10 + (~mask.flatten()).nonzero().flatten()
        for tokens in (key, value):
            tokens[:, background] = tokens[:, background].mean(dim=1, keepdim=True)
        bias[background] = -math.log(len(background))  # together they weigh as one
    expected = ref.adapter(*states, key, value, heads=HEADS, key_mask=bias[None, None, None])
    out = blend(states, tiny_use(4, masks=subject_masks))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_tokens_are_row_major_and_the_subject_mask_picks_its_own(subject_masks):
    use = tiny_use(4, masks=subject_masks)
    feature, to_k = use.reference.features[MIDDLE], use.adapters[MIDDLE].to_k
    places = [(r, y, x) for r in range(4) for y in range(2) for x in range(5)]
    every = torch.stack([feature[r, :, y, x] for r, y, x in places])
    torch.testing.assert_close(prepared(tiny_use(4)).key[0], to_k(every))
    kept: list[torch.Tensor] = []
    for image in range(4):
        own = [(y, x) for r, y, x in places if r == image]
        is_subject = subject_masks[MIDDLE][image]
        kept += [feature[image, :, y, x] for y, x in own if is_subject[y, x]]
        background = [feature[image, :, y, x] for y, x in own if not is_subject[y, x]]
        kept.append(torch.stack(background).mean(dim=0))
    torch.testing.assert_close(prepared(use).key[0], to_k(torch.stack(kept)))


def test_subject_mask_per_row_equals_each_reference_alone(states, subject_masks):
    use = tiny_use(4, masks=subject_masks, per_row=True)
    out = blend(states, use)
    for row in range(4):
        part = slice(row, row + 1)
        cache = ReferenceCache(
            {MIDDLE: use.reference.features[MIDDLE][part]},
            48,
            (16, 40),
            masks={MIDDLE: subject_masks[MIDDLE][part]},
        )
        alone = blend(tuple(t[part] for t in states), ReferenceUse(cache, use.adapters))
        torch.testing.assert_close(out[part], alone, rtol=1e-5, atol=1e-5)


# the formula inside the U-Net


def test_unet_adds_the_blend_in_place_of_the_self_attention(unet, use):
    site, seen = select_sites(unet)["output_blocks.8.1"], {}
    block = site.block

    def keep(name, output=False):
        def hook(_, args, *out):
            seen.setdefault(name, out[0] if output else args[0])

        return hook

    with torch.no_grad():
        block.attn1.forward, original = (
            lambda *a, **k: seen.setdefault("self", original(*a, **k)),
            block.attn1.forward,
        )
        hooks = [
            block.norm1.register_forward_pre_hook(keep("x")),
            block.norm2.register_forward_pre_hook(keep("after")),
        ]
        try:
            with inject(unet, use):
                call(unet)
        finally:
            del block.attn1.forward
            for hook in hooks:
                hook.remove()
        adapter = use.adapters[site.name]
        tokens = use.reference.features[site.name].flatten(2).transpose(1, 2)
        merged = adapter(
            seen["x"], seen["self"], *adapter.project_reference(tokens), heads=site.heads
        )
    torch.testing.assert_close(seen["after"], seen["x"] + merged, rtol=1e-5, atol=1e-5)


def test_fused_adapters_equal_the_trained_ones(unet, use):
    fused = changed(use, adapters=use.adapters.fuse())
    torch.testing.assert_close(injected(unet, fused), injected(unet, use), rtol=1e-4, atol=1e-5)


def test_two_uses_of_half_scale_equal_one_of_full(unet, use):
    half = changed(use, scale=0.5)
    torch.testing.assert_close(
        injected(unet, [half, half]), injected(unet, use), rtol=1e-4, atol=1e-5
    )


def test_use_that_is_off_beside_one_that_is_on_counts_for_nothing(unet, use):
    out = injected(unet, [changed(use, scale=0.0), use])
    assert torch.equal(out, injected(unet, use))


def test_adapters_of_two_precisions_work_side_by_side(unet, use):
    half = changed(use, adapters=use.adapters.fuse(dtype=torch.float16))
    both, expected = injected(unet, [half, use]), injected(unet, [use, use])
    torch.testing.assert_close(both, expected, rtol=0, atol=5e-2)


@torch.no_grad()
def test_rows_chosen_anew_give_what_a_context_of_their_own_gives(unet, use):
    choices = ([True, False, True], [True, True, True], [False, True], [False, False], [True])
    apart = [injected(unet, use, rows=rows, batch=len(rows)) for rows in choices]
    injected_whole = injected(unet, use)
    with inject(unet, use) as injection:
        for rows, expected in zip(choices, apart, strict=True):
            injection.choose_rows(rows)
            assert torch.equal(call(unet, batch=len(rows)), expected)
        injection.choose_rows(None)
        assert torch.equal(call(unet), injected_whole)


def test_per_row_equals_each_row_alone(unet, use):
    text = randn(1, 5, 48, seed=9)
    cache = capture_reference(unet, randn(3, 4, 8, 8, seed=8), 1, text)
    out = injected(unet, changed(use, reference=cache, per_row=True), batch=3)
    for row in range(3):
        one = ReferenceCache({n: f[row : row + 1] for n, f in cache.features.items()}, 48, (8, 8))
        alone = injected(unet, changed(use, reference=one), batch=3)
        torch.testing.assert_close(out[row], alone[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["fp32 adapters", "same"])
def test_half_precision_model_runs_with_adapters_of_its_own_or_full_precision(
    unet, use, dtype, adapter_dtype
):
    half = copy.deepcopy(unet).to(dtype)
    fused = use.adapters.fuse(dtype=adapter_dtype or dtype)
    out = injected(half, changed(use, adapters=fused), rows=[True, False])
    assert out.dtype == dtype
    assert torch.equal(out[1], plain(half)[1])
    tolerance = 0.05 if dtype == torch.float16 else 0.3
    torch.testing.assert_close(out[:1].float(), injected(unet, use)[:1], rtol=0, atol=tolerance)


def test_autocast_runs_with_full_precision_adapters(unet, use):
    with torch.autocast("cpu", torch.bfloat16):
        out = injected(unet, use)
    torch.testing.assert_close(out.float(), injected(unet, use), rtol=0, atol=0.3)


# once per reference, and gradients


@pytest.fixture
def key_calls(use):
    calls = []
    hooks = [
        use.adapters[layer].to_k.register_forward_hook(lambda *_: calls.append(1))
        for layer in use.adapters.layers
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def test_keys_are_computed_once_for_many_steps_and_images(unet, use, key_calls):
    with torch.no_grad(), inject(unet, use):
        for _ in range(3):
            call(unet, batch=2)
            call(unet, batch=1)
    assert len(key_calls) == LAYERS
    injected(unet, use)
    assert len(key_calls) == 2 * LAYERS


def test_keys_are_computed_at_each_call_while_gradients_are_on(unet, use, key_calls):
    with inject(unet, use):
        call(unet)
        call(unet)
    assert len(key_calls) == 2 * LAYERS


def gradients(unet, use, adapters):
    adapters.zero_grad()
    with inject(unet, use):
        call(unet).square().mean().backward()
    return {name: p.grad.clone() for name, p in adapters.named_parameters() if p.grad is not None}


@pytest.fixture
def trainable(use):
    adapters = copy.deepcopy(use.adapters).requires_grad_(True)
    return adapters, changed(use, adapters=adapters)


def test_gradients_reach_every_adapter_parameter_and_nothing_else(unet, trainable):
    adapters, use = trainable
    found = gradients(unet, use, adapters)
    assert set(found) == dict(adapters.named_parameters()).keys()
    assert all(bool((grad != 0).any()) for grad in found.values())
    assert all(p.grad is None for p in unet.parameters())
    assert not any(f.requires_grad for f in use.reference.features.values())


def test_gradients_are_the_same_with_activation_checkpointing(trainable):
    adapters, use = trainable
    unet = random_unet(48).requires_grad_(False).train()
    expected = gradients(unet, use, adapters)
    unet.enable_gradient_checkpointing()
    again = gradients(unet, use, adapters)
    assert set(again) == set(expected)
    for name, grad in again.items():
        torch.testing.assert_close(grad, expected[name], msg=name)
    assert num_hooks(unet) == 0


def test_loss_falls_when_the_adapters_learn(unet, trainable):
    adapters, use = trainable
    target, losses = plain(unet), []
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3)
    for _ in range(6):
        with inject(unet, use):
            loss = (call(unet) - target).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# nothing is left behind


def test_everything_is_gone_at_exit(unet, use):
    structure, without = repr(unet), plain(unet)
    injected(unet, use)
    assert repr(unet) == structure
    assert num_hooks(unet) == 0
    assert torch.equal(plain(unet), without)
    injected(unet, use)  # and it may be injected again


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_gone_after_an_exception(unet, use, error):
    without = plain(unet)

    def fail():
        with inject(unet, use):
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert num_hooks(unet) == 0
    assert torch.equal(plain(unet), without)
    assert not torch.equal(injected(unet, use), without)


def test_everything_is_gone_after_an_interruption_inside_the_model(unet, use):
    without, expected = plain(unet), injected(unet, use)

    def stop(*_):
        raise KeyboardInterrupt

    hook = select_sites(unet)["output_blocks.6.1"].block.attn2.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        injected(unet, use)
    hook.remove()
    assert num_hooks(unet) == 0
    assert torch.equal(plain(unet), without)
    assert torch.equal(injected(unet, use), expected)


def test_adapters_and_reference_are_left_as_they_were(unet, use):
    before = copy.deepcopy(use.adapters.state_dict())
    features = {n: f.clone() for n, f in use.reference.features.items()}
    injected(unet, changed(use, scale=2.0, mask=torch.ones(4, 4)))
    assert all(torch.equal(v, before[k]) for k, v in use.adapters.state_dict().items())
    assert all(torch.equal(f, features[n]) for n, f in use.reference.features.items())


def test_same_call_twice_gives_equal_outputs(unet, use):
    before = torch.get_rng_state()
    assert torch.equal(injected(unet, use), injected(unet, use))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("uses", ["same", "none"])
def test_nested_injection_is_refused_and_the_outer_one_goes_on(unet, use, uses):
    expected = injected(unet, use)
    with torch.no_grad(), inject(unet, use):
        with (
            pytest.raises(StateError, match="already has references injected"),
            inject(unet, [use] if uses == "same" else []),
        ):
            pass
        assert torch.equal(call(unet), expected)
    assert num_hooks(unet) == 0


def test_two_models_may_be_injected_at_once(unet, use):
    other = random_unet(48, seed=1)
    with torch.no_grad(), inject(unet, use), inject(other, use):
        assert torch.equal(call(unet), injected(copy.deepcopy(random_unet(48)), use))


# bad input


def fresh(width, **changes):
    """Adapters and a reference for another model."""
    channels = {**dict.fromkeys([MIDDLE, "output_blocks.4.1"], 8), **changes}
    features = {name: torch.zeros(1, w, 2, 2) for name, w in channels.items()}
    layout = Layout(width, channels)
    return ReferenceCache(features, width, (16, 16)), random_adapters(layout)


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ((768, {}), (1024, {}), r"with Stable Diffusion 1.5, .* for Stable Diffusion 2.1\."),
        ((2048, {}), (768, {}), r"with SDXL, .* for Stable Diffusion 1.5\."),
        ((768, {}), (768, {MIDDLE: 4}), "another structure"),
        ((768, {"output_blocks.6.1": 8}), (768, {}), "another structure"),
    ],
    ids=["sd15 and sd21", "sdxl and sd15", "another width", "another layer list"],
)
def test_reference_and_adapters_of_different_models_are_refused(one, other, named):
    cache, _ = fresh(one[0], **one[1])
    _, adapters = fresh(other[0], **other[1])
    with pytest.raises(MismatchError, match=rf"(?i){named}"):
        ReferenceUse(cache, adapters)


def layout_with(unet, context_width=None, **changes):
    layout = layout_of(unet)
    return Layout(context_width or layout.context_width, {**layout.channels, **changes})


def use_for(layout):
    features = {name: torch.zeros(1, w, 2, 2) for name, w in layout.channels.items()}
    cache = ReferenceCache(features, layout.context_width, (16, 16))
    return ReferenceUse(cache, random_adapters(layout))


def test_adapters_of_another_text_width_are_refused(unet):
    other = use_for(layout_with(unet, 768))
    with (
        pytest.raises(MismatchError, match=r"text width 48\), .* for Stable Diffusion 1.5"),
        inject(unet, other),
    ):
        pass


def test_adapters_of_another_layer_width_are_refused(unet):
    other = use_for(layout_with(unet, **{MIDDLE: 16}))
    with pytest.raises(MismatchError, match="another structure"), inject(unet, other):
        pass


def test_adapters_of_sdxl_are_refused_on_stable_diffusion(unet):
    other = use_for(layout_of(sdxl_unet()))
    with (
        pytest.raises(MismatchError, match=r"text width 48\), .* for SDXL"),
        inject(unet, other),
    ):
        pass


def test_adapters_of_a_smaller_layer_list_work(unet, use):
    names = (MIDDLE, "output_blocks.6.1")
    layout = layout_of(unet, names)
    cache = ReferenceCache({n: use.reference.features[n] for n in names}, 48, (8, 8))
    few = ReferenceUse(cache, random_adapters(layout))
    with torch.no_grad(), inject(unet, [few, use]):
        both = call(unet)
    assert not torch.equal(both, injected(unet, use))
    assert not torch.equal(injected(unet, few), plain(unet))


def test_adapters_of_no_layer_are_refused(unet, use):
    empty = copy.copy(use)
    object.__setattr__(empty, "adapters", AdapterSet(AdapterInfo(Layout(48, {}))))
    with pytest.raises(MismatchError, match="at least one cached layer"), inject(unet, empty):
        pass


@pytest.mark.parametrize("rows", [(True,), (True, False, True), (True, True, True, False)])
def test_rows_of_another_length_than_the_batch_are_refused(unet, use, rows):
    named = rf"the batch has 2, rows {len(rows)}"
    with pytest.raises(InputError, match=named):
        injected(unet, use, rows=rows)
    assert num_hooks(unet) == 0


@pytest.mark.parametrize("rows", [[0, 1], torch.tensor([1.0, 0.0]), [[True, False]]])
def test_rows_that_are_no_list_of_bools_are_refused(unet, use, rows):
    with (
        pytest.raises(InputError, match="one bool per batch row, not indices"),
        inject(unet, use, rows=rows),
    ):
        pass


def test_per_row_with_another_number_of_references_is_refused(unet, use):
    two = changed(use, reference=ReferenceCache.concatenate([use.reference] * 2), per_row=True)
    with pytest.raises(InputError, match="3 rows, 2 references"):
        injected(unet, two, batch=3)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None])
def test_scale_that_is_no_finite_number_is_refused(use, scale):
    with pytest.raises(InputError, match="scale must be a finite number"):
        changed(use, scale=scale)


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8, 8)])
def test_region_mask_of_other_axes_is_refused(use, shape):
    with pytest.raises(InputError, match=r"Expected a mask tensor"):
        changed(use, mask=torch.ones(shape))


@pytest.mark.parametrize("value", [2.0, -1.0, float("nan")])
def test_region_mask_outside_zero_to_one_is_refused(unet, use, value):
    mask = torch.ones(8, 8)
    mask[0, 0] = value
    with pytest.raises(InputError, match="mask"):
        injected(unet, changed(use, mask=mask))
    assert num_hooks(unet) == 0


def test_timestep_other_than_trained_is_warned_of(cache, adapters, caplog):
    later = ReferenceCache(dict(cache.features), 48, (8, 8), timestep=150)
    ReferenceUse(later, adapters)
    assert "encoded at timestep 150, the adapters are for timestep 1:" in caplog.text


def test_model_of_another_kind_is_refused(use):
    with (
        pytest.raises(UnsupportedModelError, match="Linear is another kind"),
        inject(nn.Linear(2, 2), use),
    ):
        pass


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_compiled_model_is_refused(use, way):
    unet = random_unet(48)
    if way == "wrapped":
        unet = torch.compile(unet, backend="eager")
    else:
        unet.compile(backend="eager")
    with pytest.raises(StateError, match=r"compiled by torch\.compile"), inject(unet, use):
        pass


def test_kept_keys_and_values_equal_fresh_ones(unet, use, key_calls):
    with torch.no_grad(), inject(unet, use):
        first, kept = call(unet), call(unet)
    calls = len(key_calls)
    fresh = injected(unet, use)
    assert len(key_calls) > calls
    assert torch.equal(first, kept)
    assert torch.equal(kept, fresh)


def test_a_use_with_its_parts_swapped_says_their_order(use):
    with pytest.raises(
        InputError, match=r"ReferenceUse\(reference, adapters\); given a AdapterSet"
    ):
        ReferenceUse(use.adapters, use.reference)
