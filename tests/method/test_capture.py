"""Features are what enters the cached layers, and reading them leaves nothing behind."""

import gc
import weakref

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from tiny_diffusers import random_adapters, random_unet, sdxl_unet
from torch import nn

from dreamcache_core import (
    InputError,
    MismatchError,
    ReferenceCache,
    ReferenceUse,
    UnsupportedModelError,
    capture_features,
    capture_reference,
    inject,
)
from dreamcache_core.method.backends import attention_sites, select_sites

pytestmark = pytest.mark.diffusers

HEIGHT, WIDTH = 8, 24
LAST_OF_ALL = "output_blocks.11.1"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sd():
    return random_unet(48), {}


@pytest.fixture(scope="module")
def sdxl():
    added = {"text_embeds": randn(3, 32, seed=3), "time_ids": randn(3, 6, seed=4)}
    return sdxl_unet(), {"added_cond_kwargs": added}


@pytest.fixture(params=["sd", "sdxl"])
def setup(request):
    unet, kwargs = request.getfixturevalue(request.param)
    width = 48 if request.param == "sd" else 2048
    return unet, randn(3, 4, HEIGHT, WIDTH, seed=1), randn(3, 5, width, seed=2), kwargs


def num_hooks(unet):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def row(kwargs, i):
    return {k: {name: t[i : i + 1] for name, t in v.items()} for k, v in kwargs.items()}


@torch.no_grad()
def read_by_hand(unet, *args, **kwargs):
    found, hooks = {}, []
    for name, site in select_sites(unet).items():

        def keep(_, args, name=name):
            found[name] = args[0].clone()

        hooks.append(site.module.register_forward_pre_hook(keep))
    unet(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return found


def assert_equal_features(features, expected):
    assert list(features) == list(expected)
    for name, feature in features.items():
        assert torch.equal(feature, expected[name]), name


def test_features_equal_what_a_hook_placed_by_hand_reads(setup):
    unet, latent, text, kwargs = setup
    expected = read_by_hand(unet, latent, 1, text, **kwargs)
    with torch.no_grad(), capture_features(unet) as features:
        unet(latent, 1, text, **kwargs)
    assert_equal_features(features, expected)
    shapes = {tuple(f.shape[2:]) for f in features.values()}
    assert all(width == 3 * height for height, width in shapes)


def test_capturing_leaves_the_output_alone(setup):
    unet, latent, text, kwargs = setup
    with torch.no_grad():
        plain = unet(latent, 1, text, **kwargs).sample
        with capture_features(unet):
            captured = unet(latent, 1, text, **kwargs).sample
    assert torch.equal(captured, plain)


def test_reference_equals_its_features_one_at_a_time_bit_for_bit(setup):
    unet, latent, text, kwargs = setup
    together = capture_reference(unet, latent, 1, text, unet_kwargs=kwargs)
    alone = [
        capture_reference(unet, latent[i : i + 1], 1, text[i : i + 1], unet_kwargs=row(kwargs, i))
        for i in range(3)
    ]
    assert_equal_features(together.features, ReferenceCache.concatenate(alone).features)
    expected = read_by_hand(unet, latent[1:2], 1, text[1:2], **row(kwargs, 1))
    assert_equal_features(alone[1].features, expected)


def test_same_inputs_twice_give_equal_features(setup):
    unet, latent, text, kwargs = setup
    one, two = (capture_reference(unet, latent, 1, text, unet_kwargs=kwargs) for _ in range(2))
    assert_equal_features(one.features, two.features)


def test_one_text_serves_all_references(sd):
    latent, text = randn(2, 4, 8, 8), randn(1, 5, 48)
    one = capture_reference(sd[0], latent, 1, text)
    two = capture_reference(sd[0], latent, 1, text.expand(2, -1, -1))
    assert_equal_features(one.features, two.features)


def test_timestep_and_text_matter(sd):
    latent, text = randn(1, 4, 8, 8), randn(1, 5, 48)
    plain = capture_reference(sd[0], latent, 1, text)
    for other in (
        capture_reference(sd[0], latent, 150, text),
        capture_reference(sd[0], latent, 1, text + 1),
    ):
        assert not torch.equal(other.features["middle_block.1"], plain.features["middle_block.1"])


def test_reference_records_what_it_was_made_of(sd):
    cache = capture_reference(sd[0], randn(2, 4, HEIGHT, WIDTH), 7, randn(1, 5, 48), seed=11)
    assert (cache.timestep, cache.seed, cache.num_references) == (7, 11, 2)
    assert cache.latent_size == (HEIGHT, WIDTH)
    assert (cache.context_width, cache.family) == (48, "custom-48")
    assert cache.layers == tuple(select_sites(sd[0]))
    assert not any(f.requires_grad for f in cache.features.values())


def test_calls_inside_one_context_are_joined(sd):
    text = randn(1, 5, 48)
    with torch.no_grad(), capture_features(sd[0]) as features:
        for seed in (1, 2):
            sd[0](randn(1, 4, 8, 8, seed=seed), 1, text)
    one, two = (capture_reference(sd[0], randn(1, 4, 8, 8, seed=s), 1, text) for s in (1, 2))
    assert_equal_features(features, ReferenceCache.concatenate([one, two]).features)


def test_chosen_layers_are_read_and_no_others(sd):
    layers = ["output_blocks.3.1", "input_blocks.1.1"]
    with torch.no_grad(), capture_features(sd[0], layers) as features:
        sd[0](randn(1, 4, 8, 8), 1, randn(1, 5, 48))
    assert list(features) == ["input_blocks.1.1", "output_blocks.3.1"]


# ending early


def count_modules(unet, run):
    """How many modules a run enters."""
    entered = []
    hooks = [m.register_forward_pre_hook(lambda *_: entered.append(1)) for m in unet.modules()]
    run()
    for hook in hooks:
        hook.remove()
    return len(entered)


def test_ending_early_gives_the_same_features_and_runs_fewer_modules(setup):
    unet, latent, text, kwargs = setup
    found = {}

    @torch.no_grad()
    def run(stop_early):
        with capture_features(unet, stop_early=stop_early) as features:
            unet(latent, 1, text, **kwargs)
        found[stop_early] = features

    counts = {early: count_modules(unet, lambda early=early: run(early)) for early in (False, True)}
    assert_equal_features(found[True], found[False])
    assert counts[True] < counts[False] - 20


def test_reference_pass_ends_at_its_last_layer(sd):
    beyond = []
    site = {s.name: s for s in attention_sites(sd[0])}[LAST_OF_ALL]
    hook = site.module.register_forward_pre_hook(lambda *_: beyond.append(1))
    capture_reference(sd[0], randn(1, 4, 8, 8), 1, randn(1, 5, 48))
    hook.remove()
    assert not beyond


def test_statements_after_an_early_end_are_skipped(sd):
    reached = []
    with torch.no_grad(), capture_features(sd[0], ["middle_block.1"], stop_early=True):
        sd[0](randn(1, 4, 8, 8), 1, randn(1, 5, 48))
        reached.append(1)
    assert not reached


def test_early_end_of_an_outer_capture_is_not_swallowed_by_an_inner_one(sd):
    reached = []
    with torch.no_grad(), capture_features(sd[0], ["input_blocks.1.1"], stop_early=True) as outer:
        with capture_features(sd[0]):
            sd[0](randn(1, 4, 8, 8), 1, randn(1, 5, 48))
        reached.append(1)
    assert list(outer) == ["input_blocks.1.1"]
    assert not reached
    assert num_hooks(sd[0]) == 0


# nothing is left behind


@pytest.mark.parametrize("stop_early", [False, True])
def test_hooks_are_gone_at_exit(sd, stop_early):
    before = num_hooks(sd[0])
    with torch.no_grad(), capture_features(sd[0], stop_early=stop_early):
        assert num_hooks(sd[0]) == before + 5
        sd[0](randn(1, 4, 8, 8), 1, randn(1, 5, 48))
    assert num_hooks(sd[0]) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(sd, error):
    before = num_hooks(sd[0])

    def fail():
        with capture_features(sd[0]):
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert num_hooks(sd[0]) == before


def test_hooks_are_gone_after_an_exception_inside_the_model(sd):
    def fail(*_):
        raise KeyboardInterrupt

    hook = sd[0].mid_block.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        capture_reference(sd[0], randn(1, 4, 8, 8), 1, randn(1, 5, 48))
    hook.remove()
    assert num_hooks(sd[0]) == 0


def test_global_random_state_is_untouched(sd):
    before = torch.get_rng_state()
    capture_reference(sd[0], randn(1, 4, 8, 8), 1, randn(1, 5, 48))
    assert torch.equal(torch.get_rng_state(), before)


# bad input


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 1, 4, 8, 8)])
def test_latent_of_other_axes_is_refused(sd, shape):
    with pytest.raises(InputError, match=r"latent of \(references, 4, height, width\), given"):
        capture_reference(sd[0], torch.zeros(shape), 1, randn(1, 5, 48))


@pytest.mark.parametrize("shape", [(5, 48), (3, 5, 48), (1, 5, 40)])
def test_text_states_that_do_not_fit_are_refused(sd, shape):
    with pytest.raises(InputError, match=r"text states of \(1 or 2, tokens, 48\), given"):
        capture_reference(sd[0], randn(2, 4, 8, 8), 1, torch.zeros(shape))


def test_layer_that_the_model_lacks_is_refused(sd):
    with (
        pytest.raises(MismatchError, match=r"no attention layer output_blocks\.0\.1"),
        capture_features(sd[0], ["output_blocks.0.1"]),
    ):
        pass


def test_call_outside_the_context_reads_nothing(sd):
    with capture_features(sd[0]) as features:
        pass
    assert features == {}


def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )


def flux():
    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def controlnet():
    return ControlNetModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=48,
        conditioning_embedding_out_channels=(16, 32),
    )


@pytest.mark.parametrize(
    "build",
    [sd3, flux, controlnet, AutoencoderKL, lambda: nn.Linear(2, 2)],
    ids=["SD 3", "Flux", "ControlNet", "VAE", "plain module"],
)
def test_model_of_another_kind_is_refused_by_name(build):
    with torch.device("meta"):
        model = build()
    with (
        pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__} is another kind"),
        capture_features(model),
    ):
        pass


@pytest.mark.parametrize("kind", [UNetSpatioTemporalConditionModel, UNetMotionModel])
def test_video_model_is_refused(kind):
    with torch.device("meta"):
        model = kind()
    with (
        pytest.raises(UnsupportedModelError, match="video model"),
        capture_features(model),
    ):
        pass


@pytest.mark.parametrize("way", ["wrapped", "in place", "one block"])
def test_compiled_model_is_read_uncompiled(way):
    unet = random_unet(48)
    latent, text = randn(1, 4, 8, 8), randn(1, 5, 48)
    expected = capture_reference(unet, latent, 1, text)
    if way == "wrapped":
        unet = torch.compile(unet, backend="eager")
    elif way == "in place":
        unet.compile(backend="eager")
    else:
        unet.mid_block.attentions[0].transformer_blocks[0].compile(backend="eager")
    cache = capture_reference(unet, latent, 1, text)
    for layer in expected.features:
        assert torch.equal(cache.features[layer], expected.features[layer])


def test_a_list_of_layers_is_followed_by_capture_and_inject():
    unet = random_unet()
    names = ["input_blocks.4.1", "output_blocks.7.1"]
    x, text = randn(1, 4, 8, 8), randn(1, 5, 768)
    cache = capture_reference(unet, x, 1, text, layers=names)
    assert cache.layers == tuple(names)
    use = ReferenceUse(cache, random_adapters(cache.layout))
    with torch.no_grad():
        plain = unet(x, 10, encoder_hidden_states=text).sample
        with inject(unet, use):
            assert not torch.equal(unet(x, 10, encoder_hidden_states=text).sample, plain)


def test_nothing_of_a_pass_waits_for_the_garbage_collector():
    unet = random_unet(48)
    gc.collect()
    gc.disable()
    try:
        with capture_features(unet, stop_early=True) as features:
            unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 3, 48))
        watched = [weakref.ref(feature) for feature in features.values()]
        del features
        assert watched
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()
