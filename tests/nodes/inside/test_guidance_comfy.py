"""The three-term rule through ComfyUI's samplers and guiders, and what each form costs."""

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from tiny import (
    CORE,
    PATCHES,
    CallCounter,
    apply,
    assert_close,
    encode,
    execute,
    make_adapters,
    make_model,
    make_text,
    run,
    sample,
)

CFG, IMAGE = 7.5, 0.4


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def setup(request):
    with torch.inference_mode():
        model = make_model(request.param)
        return model, make_adapters(model), encode(model)


class OneStep(comfy.samplers.Sampler):
    """Asks the guider for one prediction at one noise level and returns it."""

    def __init__(self, x, sigma):
        self.x, self.sigma, self.prediction = x, sigma, None

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
        sigma = torch.full((len(self.x),), self.sigma)
        self.prediction = model_wrap(self.x, sigma, **extra_args)
        return self.prediction


def predict(guider, batch=2, size=(12, 20), sigma=3.0):
    x = 3 * torch.randn((batch, 4, *size), generator=torch.Generator().manual_seed(7))
    sampler = OneStep(x, sigma)
    zeros = torch.zeros_like(x)
    guider.sample(zeros, zeros, sampler, torch.tensor([sigma, 0.0]), seed=0, disable_pbar=True)
    return sampler.prediction


def cfg_guider(model, positive=1, negative=2, cfg=CFG):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(make_text(model, positive), make_text(model, negative))
    guider.set_cfg(cfg)
    return guider


def basic_guider(model, text):
    guider = custom.Guider_Basic(model)
    guider.set_conds(make_text(model, text))
    return guider


def dreamcache_guider(model, cfg=CFG, image_guidance=IMAGE, **inputs):
    return run(
        "DreamCacheGuider",
        model=model,
        positive=make_text(model, 1),
        negative=make_text(model, 2),
        cfg=cfg,
        image_guidance=image_guidance,
        **inputs,
    )[0]


def three_terms(model, applied, cfg, image_guidance, unconditional=2):
    """METHOD.md section 5 by hand, from three separate predictions of one conditioning each."""
    e_u = predict(basic_guider(model, unconditional))
    e_c = predict(basic_guider(applied, 2))
    e_ct = predict(basic_guider(applied, 1))
    return e_u + cfg * (e_ct - e_c) + image_guidance * (e_c - e_u)


SCALES = [(7.5, 0.4), (7.5, 1.0), (1.0, 0.4), (1.0, 1.0), (4.0, 5.0), (7.5, 0.0), (0.0, 2.0)]


@pytest.mark.parametrize(("cfg", "image_guidance"), SCALES)
def test_cfg_guider_with_the_patched_model_gives_the_three_term_rule(setup, cfg, image_guidance):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference, image_guidance=image_guidance)
    assert_close(
        predict(cfg_guider(applied, cfg=cfg)), three_terms(model, applied, cfg, image_guidance)
    )


@pytest.mark.parametrize(("cfg", "image_guidance"), SCALES)
def test_dreamcache_guider_gives_the_three_term_rule_with_its_own_image_guidance(
    setup, cfg, image_guidance
):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference, image_guidance=3.3)
    ours = predict(dreamcache_guider(applied, cfg, image_guidance))
    assert_close(ours, three_terms(model, applied, cfg, image_guidance))


def test_dreamcache_guider_overrides_a_joint_apply(setup):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference, guidance="joint")
    assert_close(predict(dreamcache_guider(applied)), three_terms(model, applied, CFG, IMAGE))


def test_dreamcache_guider_takes_another_text_for_the_prediction_without_reference(setup):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference)
    ours = predict(dreamcache_guider(applied, unconditional=make_text(model, 3)))
    assert_close(ours, three_terms(model, applied, CFG, IMAGE, unconditional=3))


def test_dual_cfg_guider_with_gated_conditionings_gives_the_three_term_rule(setup):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference, image_guidance=1.0)

    def gated(text, use_reference):
        return run(
            "DreamCacheConditioning",
            conditioning=make_text(model, text),
            use_reference=use_reference,
        )[0]

    guider = custom.Guider_DualCFG(applied)
    guider.set_conds(gated(1, True), gated(2, True), gated(2, False))
    guider.set_cfg(CFG, IMAGE)
    assert_close(predict(guider), three_terms(model, applied, CFG, IMAGE))


def test_joint_guidance_is_plain_cfg_between_reference_with_text_and_neither(setup):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference, guidance="joint")
    e_u, e_ct = predict(basic_guider(model, 2)), predict(basic_guider(applied, 1))
    assert_close(predict(cfg_guider(applied)), e_u + CFG * (e_ct - e_u))


def test_two_applies_add_their_shares_of_the_block_formula(setup):
    model, adapters, reference = setup
    other = encode(model, seed=4)
    ab = apply(apply(model, adapters, reference, scale=0.5), adapters, other, scale=0.7)
    ba = apply(apply(model, adapters, other, scale=0.7), adapters, reference, scale=0.5)
    assert_close(predict(cfg_guider(ab)), predict(cfg_guider(ba)))


ROWS = [
    ("three", {"image_guidance": 0.4}, 7.5, [3]),
    ("image_guidance 1", {"image_guidance": 1.0}, 7.5, [2]),
    ("joint", {"guidance": "joint"}, 7.5, [2]),
    ("cfg 1, image_guidance 1", {"image_guidance": 1.0}, 1.0, [1]),
    ("cfg 1, joint", {"guidance": "joint"}, 1.0, [1]),
    ("cfg 1, image_guidance 0.4", {"image_guidance": 0.4}, 1.0, [3]),
]


@pytest.mark.parametrize(
    ("settings", "cfg", "rows"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS]
)
def test_rows_per_step(setup, settings, cfg, rows):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference, **settings)
    with CallCounter(model) as counter:
        predict(cfg_guider(applied, cfg=cfg), batch=1)
    assert counter.rows == rows


@pytest.mark.parametrize(
    ("cfg", "image_guidance", "rows"),
    [(7.5, 0.4, [3]), (7.5, 1.0, [2]), (1.0, 1.0, [1]), (1.0, 0.4, [3])],
)
def test_rows_per_step_of_dreamcache_guider(setup, cfg, image_guidance, rows):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference, image_guidance=2.0)
    with CallCounter(model) as counter:
        predict(dreamcache_guider(applied, cfg, image_guidance), batch=1)
    assert counter.rows == rows


def test_the_default_takes_two_predictions_a_step(setup):
    model, adapters, reference = setup
    applied = run("DreamCacheApply", model=model, adapters=adapters, reference=reference)[0]
    texts = {"positive": make_text(model, 1), "negative": make_text(model, 2)}
    for guider in (cfg_guider(applied), run("DreamCacheGuider", model=applied, **texts)[0]):
        with CallCounter(model) as counter:
            predict(guider, batch=1)
        assert counter.rows == [2]


def limited(model, start, end):
    return run("DreamCacheGuidanceRange", model=model, start_percent=start, end_percent=end)[0]


# sigma 3 of the schedule is at about 0.3 of the run
@pytest.mark.parametrize(("start", "end", "is_in"), [(0, 0.6, True), (0.6, 1, False)])
@pytest.mark.parametrize("make_guider", [cfg_guider, dreamcache_guider])
@pytest.mark.parametrize("cfg", [CFG, 1.0])
def test_outside_its_range_image_guidance_is_one_and_saves_a_row(
    setup, start, end, is_in, make_guider, cfg
):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference)
    with CallCounter(model) as counter:
        ours = predict(make_guider(limited(applied, start, end), cfg=cfg))
    fewest = 2 if cfg == 1 else 4
    assert counter.rows == [6 if is_in else fewest]
    expected = three_terms(model, applied, cfg, IMAGE if is_in else 1.0)
    assert_close(ours, expected)


def test_a_guidance_range_that_covers_the_run_changes_nothing(setup):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference)
    assert torch.equal(sample(limited(applied, 0.0, 1.0)), sample(applied))


def test_a_guidance_range_counts_rows_down_over_a_run_and_outlives_a_second_apply(setup):
    model, adapters, reference = setup
    once = limited(apply(model, adapters, reference), 0.0, 0.5)
    twice = apply(once, adapters, encode(model, seed=4))
    for applied in (once, twice):
        with CallCounter(model) as counter:
            sample(applied, steps=6)
        assert counter.rows == sorted(counter.rows, reverse=True)
        assert set(counter.rows) == {3, 2}


@pytest.mark.parametrize("guidance", ["joint", "separate"])
def test_a_guidance_range_has_no_effect_where_two_predictions_are_enough(setup, guidance):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference, image_guidance=1.0, guidance=guidance)
    out = execute("DreamCacheGuidanceRange", model=applied)
    assert torch.equal(sample(out.result[0]), sample(applied))
    assert "no effect" in out.ui.value
    needed = execute("DreamCacheGuidanceRange", model=apply(model, adapters, reference))
    assert "three predictions a step from 0 to 0.5 of the run" in needed.ui.value


def test_a_guidance_range_reads_the_noise_level_once_a_step(setup, monkeypatch):
    model, adapters, reference = setup
    both = apply(model, adapters, reference, end_percent=0.9)
    reads, original = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: reads.append(1) or original(t))
    predict(cfg_guider(both))
    with_one_range = len(reads)
    reads.clear()
    predict(cfg_guider(limited(both, 0.0, 0.6)))
    assert with_one_range == 1
    assert len(reads) == with_one_range


def test_the_noise_levels_of_ranges_are_looked_up_once_a_run(setup, monkeypatch):
    model, adapters, reference = setup
    sampling = type(model.get_model_object("model_sampling"))
    looked_up, original = [], sampling.percent_to_sigma
    monkeypatch.setattr(
        sampling,
        "percent_to_sigma",
        lambda self, percent: looked_up.append(percent) or original(self, percent),
    )
    both = limited(apply(model, adapters, reference, end_percent=0.9), 0.1, 0.6)
    sample(both, steps=2)
    of_two_steps = len(looked_up)
    sample(both, steps=6)
    assert {0.1, 0.6, 0.9} <= set(looked_up)
    assert len(looked_up) == 2 * of_two_steps


def test_a_guidance_range_needs_a_model_with_a_reference(setup):
    with pytest.raises(CORE.StateError, match=r"DreamCache Guidance Range needs.*Apply DreamCache"):
        limited(setup[0], 0.0, 0.5)


def test_a_guidance_range_that_holds_nothing_is_refused(setup):
    model, adapters, reference = setup
    with pytest.raises(CORE.InputError, match=r"start before its end; given 0\.5 to 0\.5"):
        limited(apply(model, adapters, reference), 0.5, 0.5)


def test_basic_guider_needs_one_row(setup):
    model, adapters, reference = setup
    with CallCounter(model) as counter:
        predict(basic_guider(apply(model, adapters, reference), 1), batch=1)
    assert counter.rows == [1]


def test_ksampler_uses_the_same_rule_at_every_step(setup):
    model, adapters, reference = setup
    applied = apply(model, adapters, reference)
    guider = dreamcache_guider(applied)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    noise = torch.randn((1, 4, 16, 16), generator=torch.manual_seed(5))
    zeros = torch.zeros_like(noise)
    theirs = guider.sample(
        noise, zeros, comfy.samplers.sampler_object("euler"), sigmas, seed=5, disable_pbar=True
    )
    assert torch.equal(sample(applied), theirs)


def test_the_reference_passes_through_the_unet_once_for_many_steps_and_images(setup):
    model, adapters, _ = setup
    with CallCounter(model) as counter:
        reference = encode(model)
    assert counter.rows == [1]
    applied = apply(model, adapters, reference)
    with CallCounter(model) as counter:
        sample(applied, steps=5, batch=3)
        sample(applied, steps=5, batch=3, seed=6)
    assert counter.rows == [9] * 10


def test_keys_and_values_are_computed_once_per_run(setup, monkeypatch):
    model, adapters, reference = setup
    applied, layers = apply(model, adapters, reference), len(adapters.layers)
    calls, original = [], PATCHES.prepare_layer
    monkeypatch.setattr(
        PATCHES, "prepare_layer", lambda *a, **k: calls.append(a[1]) or original(*a, **k)
    )
    sample(applied, steps=4)
    assert len(calls) == layers
    sample(applied, steps=4)
    assert len(calls) == 2 * layers
