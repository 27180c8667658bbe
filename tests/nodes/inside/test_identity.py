"""What must be plain ComfyUI bit for bit, and that nothing stays behind."""

import copy
import re

import comfy_extras.nodes_model_advanced as advanced
import pytest
import torch
from tiny import (
    APPLIED,
    MODEL,
    RUN,
    CallCounter,
    apply,
    encode,
    make_adapters,
    make_model,
    make_text,
    run,
    said_by_apply,
    sample,
)


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def setup(request):
    with torch.inference_mode():
        model = make_model(request.param)
        return model, make_adapters(model), encode(model), sample(model, batch=2)


def snapshot_of(model):
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.model.diffusion_model.named_modules()
    }
    state = (
        model.wrappers,
        model.callbacks,
        model.attachments,
        model.additional_models,
        model.object_patches,
        model.patches,
    )
    return hooks, copy.copy([dict(s) for s in state]), copy.deepcopy(model.model_options)


def test_the_reference_changes_the_image(setup):
    model, adapters, reference, plain = setup
    changed = sample(apply(model, adapters, reference), batch=2)
    assert torch.isfinite(changed).all()
    assert (changed - plain).abs().max() > 0.05 * plain.abs().max()


def test_scale_zero_is_plain_bit_for_bit(setup):
    model, adapters, reference, plain = setup
    assert torch.equal(sample(apply(model, adapters, reference, scale=0.0), batch=2), plain)


def test_an_all_zero_mask_is_plain_bit_for_bit(setup):
    model, adapters, reference, plain = setup
    applied = apply(model, adapters, reference, mask=torch.zeros(1, 128, 128))
    assert torch.equal(sample(applied, batch=2), plain)


def test_an_empty_region_mask_is_said_and_not_that_the_subject_acts(setup, caplog):
    model, adapters, reference, _ = setup
    said = said_by_apply(model, adapters, reference, mask=torch.zeros(1, 128, 128))
    assert "mask of Apply DreamCache is empty: the subject appears nowhere" in said
    assert "subject 1" not in said
    assert said in caplog.text
    one_of_two = torch.stack([torch.zeros(128, 128), torch.ones(128, 128)])
    assert "empty for 1 of 2 images" in said_by_apply(model, adapters, reference, mask=one_of_two)


def test_load_images_placeholder_mask_counts_as_no_mask(setup):
    model, adapters, reference, _ = setup
    given = {"mask": torch.zeros(1, 64, 64)}
    applied = apply(model, adapters, reference, **given)
    assert torch.equal(sample(applied), sample(apply(model, adapters, reference)))
    assert "everywhere: the mask is what Load Image gives" in said_by_apply(
        model, adapters, reference, **given
    )


def test_an_all_one_mask_equals_no_mask(setup):
    model, adapters, reference, _ = setup
    applied = apply(model, adapters, reference, mask=torch.ones(1, 128, 128))
    assert torch.equal(sample(applied), sample(apply(model, adapters, reference)))


@pytest.mark.parametrize("percents", [(0.0, 0.0), (1.0, 1.0), (0.7, 0.3)])
@pytest.mark.parametrize("cfg", [7.5, 1.0])
def test_a_range_that_holds_no_step_is_plain_bit_for_bit(setup, percents, cfg):
    model, adapters, reference, plain = setup
    applied = apply(model, adapters, reference, start_percent=percents[0], end_percent=percents[1])
    with CallCounter(model) as counter:
        ours = sample(applied, batch=2, cfg=cfg)
    with CallCounter(model) as plain_counter:
        plain = sample(model, batch=2, cfg=cfg)
    assert torch.equal(ours, plain)
    assert counter.rows == plain_counter.rows


def test_a_range_that_is_over_leaves_the_later_steps_plain(setup):
    model, adapters, reference, _ = setup
    applied = apply(model, adapters, reference, end_percent=0.5)
    with CallCounter(model) as counter:
        sample(applied, steps=4)
    on = [rows == 3 for rows in counter.rows]
    assert on[0]
    assert not on[-1]
    assert on == sorted(on, reverse=True)


@pytest.mark.parametrize("schedule", [("eps", False), ("eps", True), ("lcm", False)], ids=str)
def test_ranges_that_meet_never_overlap(setup, schedule):
    model, adapters, reference, _ = setup
    model = advanced.ModelSamplingDiscrete().patch(model, *schedule)[0]
    sampling = model.get_model_object("model_sampling")
    first = apply(model, adapters, reference, end_percent=0.5)
    both = apply(first, adapters, reference, start_percent=0.5)
    store = RUN.RunStore(APPLIED.applied_to(both), sampling)
    border = float(torch.tensor(sampling.percent_to_sigma(0.5)))
    for sigma in (border, border * 1.01, border * 0.99):
        with store.new_step(torch.tensor([sigma]), torch.zeros(1, 4, 8, 8)) as step:
            assert step.active == ((0,) if sigma > border else (1,))


def test_the_model_before_apply_stays_plain(setup):
    model, adapters, reference, plain = setup
    before = snapshot_of(model)
    applied = apply(model, adapters, reference)
    sample(applied, batch=2)
    assert snapshot_of(model) == before
    assert torch.equal(sample(model, batch=2), plain)


def test_branching_and_requeueing_give_the_same_every_time(setup):
    model, adapters, reference, plain = setup
    one = apply(model, adapters, reference)
    other = apply(model, adapters, reference, image_guidance=2.0)
    first, second = sample(one), sample(other)
    assert not torch.equal(first, second)
    assert torch.equal(sample(one), first)
    assert torch.equal(sample(other), second)
    assert torch.equal(sample(apply(model, adapters, reference)), first)
    assert torch.equal(sample(model, batch=2), plain)


def test_a_second_apply_adds_to_the_first_without_touching_it(setup):
    model, adapters, reference, _ = setup
    one = apply(model, adapters, reference)
    before = sample(one)
    two = apply(one, adapters, encode(model, seed=9))
    assert not torch.equal(sample(two), before)
    assert torch.equal(sample(one), before)
    assert len(APPLIED.applied_to(one).uses) == 1
    assert len(APPLIED.applied_to(two).uses) == 2
    assert all(
        len(keyed["dreamcache"]) == 1 for keyed in two.wrappers.values() if "dreamcache" in keyed
    )


def test_a_second_apply_of_scale_zero_changes_nothing_but_the_guidance(setup):
    model, adapters, reference, _ = setup
    one = apply(model, adapters, reference)
    two = apply(one, adapters, encode(model, seed=9), scale=0.0)
    assert torch.equal(sample(two), sample(one))


def test_rows_that_are_off_equal_the_plain_unet_bit_for_bit(setup):
    model, adapters, reference, _ = setup
    unet, layout = model.model.diffusion_model, MODEL.model_layout(model)
    applied = apply(model, adapters, reference)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((3, 4, 12, 20), generator=generator)
    text = torch.randn((3, 7, layout.context_width), generator=generator)
    sigma = torch.full((3,), 2.0)
    extra = (
        {}
        if unet.num_classes is None
        else {
            "y": torch.randn(
                (3, unet.adm_in_channels if hasattr(unet, "adm_in_channels") else 2816),
                generator=generator,
            )
        }
    )

    def run_rows(model, gate):
        model.pre_run()
        options = {"wrappers": copy.deepcopy(model.wrappers)} if gate else {}
        kwargs = {"dreamcache_gate": torch.tensor(gate)[:, None]} if gate else {}
        try:
            return model.model.apply_model(
                x, sigma, c_crossattn=text, transformer_options=options, **extra, **kwargs
            )
        finally:
            model.cleanup()

    plain = run_rows(model, None)
    for gate in ([0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1]):
        ours = run_rows(applied, gate)
        for row, is_on in enumerate(gate):
            assert torch.equal(ours[row], plain[row]) is not bool(is_on), (gate, row)


def test_one_marked_text_leaves_a_model_with_scale_zero_plain_and_in_one_call(setup):
    model, adapters, reference, plain = setup
    marked = run("DreamCacheConditioning", conditioning=make_text(model, 1), use_reference=False)[0]
    with CallCounter(model) as counter:
        ours = sample(apply(model, adapters, reference, scale=0.0), batch=2, positive=marked)
    assert counter.rows == [4, 4, 4]
    assert torch.equal(ours, plain)


def test_a_text_marked_as_seeing_the_reference_is_like_one_without_a_mark(setup):
    model, _, _, plain = setup
    marked = run("DreamCacheConditioning", conditioning=make_text(model, 1), use_reference=True)[0]
    with CallCounter(model) as counter:
        assert torch.equal(sample(model, batch=2, positive=marked), plain)
    assert counter.rows == [4, 4, 4]


def test_every_text_switched_off_is_close_to_plain(setup):
    model, adapters, reference, plain = setup
    gate = {"use_reference": False}
    positive = run("DreamCacheConditioning", conditioning=make_text(model, 1), **gate)[0]
    negative = run("DreamCacheConditioning", conditioning=make_text(model, 2), **gate)[0]
    ours = sample(
        apply(model, adapters, reference, image_guidance=1.0),
        batch=2,
        positive=positive,
        negative=negative,
    )
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("shape", [(1, 4, 2, 16, 16), (1, 4, 16)], ids=["video", "audio"])
def test_latents_of_another_kind_of_model_end_in_comfyuis_own_words(setup, shape):
    model, adapters, reference, _ = setup
    messages = []
    for given in (model, apply(model, adapters, reference)):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            sample(given, latent=torch.zeros(shape), steps=1)
        # how many rows are asked for together is the guidance's business
        messages.append((caught.type, re.sub(r"\d+", "n", str(caught.value))))
    assert messages[0] == messages[1]
