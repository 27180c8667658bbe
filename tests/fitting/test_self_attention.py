"""Adapters that start from the base model's self-attention look at a reference as it looks at its own image."""

import pytest
import torch
from tiny_diffusers import random_unet

from dreamcache_core import StateError, capture_features
from dreamcache_core.fitting.self_attention import (
    LinearGuess,
    observe_self_attention,
    start_from_self_attention,
)
from dreamcache_core.method.backends import select_sites
from dreamcache_core.training.initialisation import new_adapters

pytestmark = pytest.mark.diffusers


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_guess_is_exact_where_states_depend_linearly_on_the_map():
    guess, matrix = LinearGuess(6), randn(6, 6, seed=3)
    for seed in (1, 2):
        maps = randn(2, 6, 5, 7, seed=seed)
        guess.read_map(None, (maps,), {})
        guess.read_states(None, (maps.flatten(2).transpose(1, 2) @ matrix,), {})
    torch.testing.assert_close(guess.solve().float(), matrix, rtol=2e-3, atol=2e-3)


def test_a_guess_without_a_pass_is_refused():
    with pytest.raises(StateError, match="No reference was looked at"):
        LinearGuess(4).solve()


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"use_linear_projection": True}], ids=["conv", "linear"])
def test_started_adapters_see_in_the_cached_map_what_self_attention_sees(settings):
    unet = random_unet(48, **settings)
    text = randn(1, 5, 48, seed=9)
    adapters = new_adapters(unet, init="identity")
    merge = adapters["middle_block.1"].merge.weight.clone()
    with observe_self_attention(unet, adapters.layers) as guesses:
        for seed in range(8):
            unet(randn(32, 4, 16, 16, seed=seed), 1, text.expand(32, -1, -1))
    start_from_self_attention(unet, adapters, guesses)
    assert not any(m._forward_pre_hooks for m in unet.modules())
    assert torch.equal(adapters["middle_block.1"].merge.weight, merge)

    # further images
    seen, sites = {}, select_sites(unet, adapters.layers)
    hooks = [
        module.register_forward_hook(lambda *call, key=(name, part): seen.update({key: call[-1]}))
        for name, site in sites.items()
        for part, module in (("keys", site.block.attn1.to_k), ("values", site.block.attn1.to_v))
    ]
    with capture_features(unet, adapters.layers) as features:
        unet(randn(16, 4, 16, 16, seed=99), 1, text.expand(16, -1, -1))
    for hook in hooks:
        hook.remove()
    for name, site in sites.items():
        tokens = features[name].flatten(2).transpose(1, 2)
        guessed = dict(
            zip(("keys", "values"), adapters[name].project_reference(tokens), strict=True)
        )
        for part, values in guessed.items():
            expected = seen[name, part]
            away = expected - expected.mean(dim=(0, 1))
            share = (values - expected).square().mean() / away.square().mean()
            assert share < 0.3, (name, part)
        x = randn(2, 9, site.channels)
        assert torch.equal(
            adapters[name].to_q(adapters[name].norm(x)), site.block.attn1.to_q(site.block.norm1(x))
        )
