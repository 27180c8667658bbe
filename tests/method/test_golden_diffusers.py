"""The authors' numbers, reproduced on diffusers' U-Net."""

import pytest
import torch
from golden import (
    CASES,
    S_IMAGE,
    S_TEXT,
    alphas_cumprod,
    largest_error,
    load_case,
    relative_error,
)
from tiny_diffusers import golden_unet

from dreamcache_core import ReferenceUse, capture_reference, combine_guidance, inject
from dreamcache_core.method.adapter_files import adapters_from_released

pytestmark = pytest.mark.diffusers


@pytest.fixture(scope="module", params=CASES)
def setup(request):
    case = load_case(request.param)
    unet = golden_unet(case)
    cache = capture_reference(unet, case.vectors["x_ref_t1"], 1, case.vectors["null_text"])
    adapters = adapters_from_released(case.adapter_weights, family=case.family)
    return case, unet, cache, adapters


@pytest.fixture(params=["fused", "unfused"])
def use(request, setup):
    _, _, cache, adapters = setup
    return ReferenceUse(cache, adapters.fuse() if request.param == "fused" else adapters)


def predict(unet, x, t, texts, use, rows):
    """The three predictions in one call: (negative, off), (negative, on), (positive, on)."""
    text = torch.cat([text.expand(len(x), -1, -1) for text in texts])
    batch = x.repeat(len(texts), 1, 1, 1)
    row_is_on = [on for on in rows for _ in range(len(x))]
    with torch.no_grad(), inject(unet, use, rows=row_is_on):
        return unet(batch, t, encoder_hidden_states=text).sample.chunk(len(texts))


def three_predictions(setup, use, x, t):
    case, unet, _, _ = setup
    negative, positive = case.vectors["negative_text"], case.vectors["positive_text"]
    return predict(unet, x, t, (negative, negative, positive), use, (False, True, True))


def test_cached_features_equal_the_golden_ones(setup):
    case, _, cache, _ = setup
    golden = {
        k.removeprefix("cache."): v for k, v in case.vectors.items() if k.startswith("cache.")
    }
    assert set(golden) == set(cache.layers)
    for layer, feature in golden.items():
        assert largest_error(cache.features[layer], feature) <= 3e-5, layer


def test_noised_reference_equals_the_golden_one(setup):
    vectors = setup[0].vectors
    alpha = alphas_cumprod()[1].float()
    noised = alpha.sqrt() * vectors["z_ref"] + (1 - alpha).sqrt() * vectors["ref_noise"]
    assert largest_error(noised, vectors["x_ref_t1"]) <= 1e-6


def test_three_predictions_and_guided_eps_equal_the_golden_ones(setup, use):
    vectors = setup[0].vectors
    e_u, e_c, e_ct = three_predictions(setup, use, vectors["x_T"], 601)
    assert largest_error(e_u, vectors["eps_noref_negative_t601"]) <= 2e-5
    assert largest_error(e_c, vectors["eps_ref_negative_t601"]) <= 2e-5
    assert largest_error(e_ct, vectors["eps_ref_positive_t601"]) <= 2e-5
    guided = combine_guidance(e_u, e_c, e_ct, guidance_scale=S_TEXT, image_guidance_scale=S_IMAGE)
    assert relative_error(guided, vectors["eps_guided_t601"]) <= 5e-5


def test_ddim_states_equal_the_golden_ones(setup, use):
    vectors = setup[0].vectors
    alphas, x = alphas_cumprod(), vectors["x_T"]
    steps = (751, 501, 251, 1)
    for i, t in enumerate(steps):
        previous = alphas[steps[i + 1]] if i + 1 < len(steps) else alphas[0]
        eps = combine_guidance(
            *three_predictions(setup, use, x, t),
            guidance_scale=S_TEXT,
            image_guidance_scale=S_IMAGE,
        )
        x0 = (x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
        x = (previous.sqrt() * x0 + (1 - previous).sqrt() * eps).float()
        assert relative_error(x, vectors[f"ddim_x_after_step_{i}"]) <= 5e-5, i
