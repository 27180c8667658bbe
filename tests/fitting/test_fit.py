"""Adapters fitted to a model: they are its self-attention, the same whenever they are made, however its weights are kept."""

import pytest
import torch
from tiny_diffusers import random_unet
from tiny_pipeline import tiny_pipeline, tiny_sdxl_pipeline, wrap
from torch import nn

from dreamcache_core import InputError, StateError, UnsupportedModelError, adapters_from_model
from dreamcache_core.fitting import fit
from dreamcache_core.fitting.fit import FitSettings, draw_latent
from dreamcache_core.fitting.noise_schedule import PREDICTIONS, NoiseSchedule
from dreamcache_core.method.backends import select_sites

pytestmark = pytest.mark.diffusers

ALPHAS = torch.linspace(0.9985, 0.0047, 1000)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pipeline(tmp_path):
    return wrap(tiny_pipeline(tmp_path))


def sites(pipeline):
    return select_sites(pipeline.pipeline.unet)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_schedule_takes_apart_what_it_has_noised(prediction):
    schedule = NoiseSchedule(ALPHAS, prediction)
    latent, noise, timesteps = (
        randn(3, 4, 2, 2),
        randn(3, 4, 2, 2, seed=1),
        torch.tensor([0, 400, 999]),
    )
    noised = schedule.add_noise(latent, noise, timesteps)
    found = schedule.split(noised, schedule.target(latent, noise, timesteps), timesteps)
    torch.testing.assert_close(found, (latent, noise), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_one_latent_that_a_model_knows_is_drawn(prediction):
    schedule, known = NoiseSchedule(ALPHAS, prediction), randn(1, 4, 3, 3, seed=5)

    def predict(latent, noise, timestep):
        timesteps = torch.tensor([timestep])
        noised = schedule.add_noise(latent, noise, timesteps)
        signal, sigma = ALPHAS[timestep].sqrt(), (1 - ALPHAS[timestep]).sqrt()
        return schedule.target(known, (noised - signal * known) / sigma, timesteps)

    drawn = draw_latent(predict, schedule, randn(1, 4, 3, 3))
    torch.testing.assert_close(drawn, known, rtol=0, atol=1e-3)


def test_adapters_mix_self_attention_of_image_and_reference(pipeline):
    settings = FitSettings(timestep=50, reference_share=0.3, query_scale=2.0)
    adapters = adapters_from_model(pipeline, settings=settings)
    assert adapters.info.timestep == 50
    assert adapters.info.prediction == "epsilon"
    for name, site in sites(pipeline).items():
        adapter, attn1, identity = adapters[name], site.block.attn1, torch.eye(site.channels)
        expected = [0.7 * identity, 0.3 * identity]
        torch.testing.assert_close(adapter.merge.weight, torch.cat(expected, dim=1))
        assert not adapter.merge.bias.any()
        torch.testing.assert_close(adapter.to_q.weight, attn1.to_q.weight * 2)
        torch.testing.assert_close(adapter.to_out.weight, attn1.to_out[0].weight)
        assert torch.equal(adapter.to_out.bias, attn1.to_out[0].bias)
        assert torch.equal(adapter.norm.weight, site.block.norm1.weight)


def test_two_fits_are_equal_and_leave_nothing_behind(pipeline):
    before, passes = torch.random.get_rng_state(), []
    first = adapters_from_model(pipeline, on_pass=lambda: passes.append(1))
    assert len(passes) == fit.NUM_PASSES
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(m._forward_pre_hooks for m in pipeline.pipeline.unet.modules())
    torch.rand(3)
    again, other = adapters_from_model(pipeline), adapters_from_model(pipeline, seed=1)
    equal = [
        all(torch.equal(a, b) for a, b in zip(first.parameters(), each.parameters(), strict=True))
        for each in (again, other)
    ]
    assert equal == [True, False]


def test_sdxl_is_fitted_with_its_sizes_and_pooled_text(tmp_path):
    adapters = adapters_from_model(wrap(tiny_sdxl_pipeline(tmp_path)))
    assert adapters.family == "sdxl"
    assert all(bool(weight.isfinite().all()) for weight in adapters.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_adapters_close_to_those_of_float32(pipeline, dtype):
    precise = adapters_from_model(pipeline, size=128)
    pipeline.pipeline.to(dtype=dtype)
    for ours, exact in zip(
        adapters_from_model(pipeline, size=128).parameters(), precise.parameters(), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 0.2 * exact.norm()


def test_weights_count_as_they_compute(pipeline):
    """As LoRAs in other modules and quantised layers do: the weight that lies there is not the one that acts."""

    class Changed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return 2 * self.layer(x)

    plain = adapters_from_model(pipeline)
    name, site = list(sites(pipeline).items())[-1]
    passes = []

    def change_weights():  # after the passes, so that nothing else differs
        passes.append(1)
        if len(passes) == fit.NUM_PASSES:
            site.block.attn1.to_v = Changed(site.block.attn1.to_v)

    changed = adapters_from_model(pipeline, on_pass=change_weights)
    values = [dict(each[name].named_parameters())["to_v.weight"] for each in (changed, plain)]
    torch.testing.assert_close(values[0], values[1] * 2)
    assert torch.equal(changed[name].to_k.weight, plain[name].to_k.weight)


def test_self_attention_of_another_package_is_refused(pipeline):
    class Foreign(nn.Module):
        def __init__(self, attn1):
            super().__init__()
            self.inner = attn1

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    block = sites(pipeline)["output_blocks.8.1"].block
    block.attn1 = Foreign(block.attn1)
    with pytest.raises(
        UnsupportedModelError, match=r"output_blocks.8.1 is a Foreign.* Load the model without it"
    ):
        adapters_from_model(pipeline)


def test_a_model_that_computes_nan_is_refused(tmp_path):
    unet = random_unet(64, sample_size=8)
    with torch.no_grad():
        unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(StateError, match="NaN or infinity"):
        adapters_from_model(wrap(tiny_pipeline(tmp_path, unet=unet)))


@pytest.mark.parametrize("size", [60, 0, -8])
def test_a_size_that_no_image_has_is_refused(pipeline, size):
    with pytest.raises(InputError, match=f"multiple of 8; given {size}"):
        adapters_from_model(pipeline, size=size)


@pytest.mark.parametrize(
    "given", [{"timestep": 1000}, {"reference_share": 1.1}, {"query_scale": float("nan")}], ids=str
)
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(InputError, match=f"{next(iter(given))} must be"):
        FitSettings(**given)
