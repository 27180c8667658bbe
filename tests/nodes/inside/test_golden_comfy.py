"""The authors' numbers, reproduced on ComfyUI's U-Net through the core and through ComfyUI's samplers."""

import comfy.samplers
import pytest
import torch
from golden import CASES, S_IMAGE, S_TEXT, largest_error, load_case, relative_error
from tiny import CORE, load_weights, make_model, pack_module, run


def golden_model(case):
    extra = {"context_dim": case.context_width}
    kind = "sd21" if case.name == "sd21_tiny" else "sd15"
    return load_weights(make_model(kind, **extra), case.unet_weights)


@pytest.fixture(scope="module", params=CASES)
def setup(request):
    case = load_case(request.param)
    model = golden_model(case)
    checkpoints = pack_module("dreamcache_core.method.adapter_files")
    adapters = checkpoints.adapters_from_released(case.adapter_weights, family=case.family)
    vectors = case.vectors
    unet = model.model.diffusion_model
    cache = CORE.capture_reference(unet, vectors["x_ref_t1"], 1, vectors["null_text"])
    return case, model, adapters, cache


def test_cached_features_equal_the_golden_ones(setup):
    case, _, _, cache = setup
    golden = {
        k.removeprefix("cache."): v for k, v in case.vectors.items() if k.startswith("cache.")
    }
    assert set(golden) == set(cache.layers)
    for layer, feature in golden.items():
        assert largest_error(cache.features[layer], feature) <= 3e-5, layer


@pytest.mark.parametrize("fused", [True, False])
def test_three_predictions_equal_the_golden_ones_through_inject(setup, fused):
    case, model, adapters, cache = setup
    vectors = case.vectors
    use = CORE.ReferenceUse(cache, adapters.fuse() if fused else adapters)
    negative, positive = vectors["negative_text"], vectors["positive_text"]
    text = torch.cat([t.expand(2, -1, -1) for t in (negative, negative, positive)])
    x = vectors["x_T"].repeat(3, 1, 1, 1)
    rows = [False] * 2 + [True] * 4
    with CORE.inject(model.model.diffusion_model, use, rows=rows):
        e_u, e_c, e_ct = model.model.diffusion_model(
            x, torch.full((6,), 601.0), context=text
        ).chunk(3)
    assert largest_error(e_u, vectors["eps_noref_negative_t601"]) <= 2e-5
    assert largest_error(e_c, vectors["eps_ref_negative_t601"]) <= 2e-5
    assert largest_error(e_ct, vectors["eps_ref_positive_t601"]) <= 2e-5
    guided = CORE.combine_guidance(
        e_u, e_c, e_ct, guidance_scale=S_TEXT, image_guidance_scale=S_IMAGE
    )
    assert relative_error(guided, vectors["eps_guided_t601"]) <= 5e-5


def test_ddim_states_equal_the_golden_ones_through_the_nodes_and_a_guider(setup):
    case, model, adapters, cache = setup
    vectors = case.vectors
    applied = run(
        "DreamCacheApply", model=model, adapters=adapters, reference=cache, image_guidance=S_IMAGE
    )[0]
    sampling = model.get_model_object("model_sampling")
    alphas = 1 / (1 + sampling.sigmas.double() ** 2)
    steps = (751, 501, 251, 1)
    sigmas = torch.cat(
        [sampling.sigma(torch.tensor([float(t)])) for t in steps] + [sampling.sigmas[:1]]
    ).float()
    states = []

    class Ddim(comfy.samplers.Sampler):
        def sample(
            self,
            model_wrap,
            sigmas,
            extra_args,
            callback,
            noise,
            latent_image=None,
            denoise_mask=None,
            disable_pbar=False,
        ):
            x = vectors["x_T"].double()
            for i, t in enumerate(steps):
                alpha, previous = alphas[t], alphas[steps[i + 1]] if i < 3 else alphas[0]
                scaled = (x / alpha.sqrt()).float()  # ComfyUI's x is x_0 + sigma * noise
                x0 = model_wrap(scaled, sigmas[i : i + 1].expand(2), **extra_args).double()
                eps = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
                x = previous.sqrt() * x0 + (1 - previous).sqrt() * eps
                states.append(x.float())
            return x.float()

    guider = comfy.samplers.CFGGuider(applied)
    guider.set_conds([[vectors["positive_text"], {}]], [[vectors["negative_text"], {}]])
    guider.set_cfg(S_TEXT)
    guider.sample(
        torch.zeros(2, 4, *vectors["x_T"].shape[-2:]),
        torch.zeros_like(vectors["x_T"]),
        Ddim(),
        sigmas,
        seed=0,
    )
    for i, state in enumerate(states):
        assert relative_error(state, vectors[f"ddim_x_after_step_{i}"]) <= 5e-5, i


def test_encode_node_equals_a_forward_pass_by_hand(setup):
    case, model, _, _ = setup
    encoding = pack_module("nodes.host.encode")
    vectors = case.vectors
    latent = vectors["z_ref"] / model.model.latent_format.scale_factor
    ours = encoding.encode_reference(
        model, latent, [[vectors["null_text"], {}]], seed=3, timestep=1, mask=None
    )
    noise = torch.randn((1, *latent.shape[1:]), generator=torch.Generator().manual_seed(3))
    alpha = 1 / (1 + model.get_model_object("model_sampling").sigmas[1] ** 2)
    noised = alpha.sqrt() * vectors["z_ref"] + (1 - alpha).sqrt() * noise
    theirs = CORE.capture_reference(model.model.diffusion_model, noised, 1, vectors["null_text"])
    for layer in theirs.layers:
        assert relative_error(ours.features[layer], theirs.features[layer]) <= 1e-5, layer
