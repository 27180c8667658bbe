"""Where DreamCache meets ComfyUI's other mechanisms: nested predictions, crops, schedules, foreign guiders."""

import logging

import comfy.samplers
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_perpneg as perpneg
import pytest
import torch
from tiny import (
    APPLIED,
    CORE,
    GATES,
    MODEL,
    PATCHES,
    WRAPPERS,
    CallCounter,
    FlatVAE,
    apply,
    assert_close,
    encode,
    make_adapters,
    make_image,
    make_model,
    make_text,
    run,
    said_by_apply,
    sample,
)

import nodes as comfy_nodes


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        model = make_model("sd15")
        return model, make_adapters(model), encode(model)


def add_nested_difference(model, which):
    """What PAG and SAG do, with a perturbation that perturbs nothing: it must add nothing."""
    patched = model.clone()

    def post_cfg(args):
        again = comfy.samplers.calc_cond_batch(
            args["model"], [args[which]], args["input"], args["sigma"], args["model_options"]
        )[0]
        return args["denoised"] + 3.0 * (args[f"{which}_denoised"] - again)

    patched.set_model_sampler_post_cfg_function(post_cfg)
    return patched


@pytest.mark.parametrize("which", ["cond", "uncond"])
@pytest.mark.parametrize(
    "settings", [{"image_guidance": 0.4}, {"image_guidance": 3.0}, {"image_guidance": 1.0}]
)
def test_the_difference_of_a_prediction_to_itself_is_nothing(parts, which, settings):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference, **settings)
    assert_close(
        sample(add_nested_difference(applied, which), steps=2), sample(applied, steps=2), 1e-4
    )


def test_two_nested_differences_add_nothing_either(parts):
    applied = apply(*parts)
    both = add_nested_difference(add_nested_difference(applied, "cond"), "uncond")
    assert_close(sample(both, steps=2), sample(applied, steps=2), 1e-4)


def seen_regions(monkeypatch):
    seen, original = [], PATCHES.blend_references

    def spy(x, n, references, **options):
        seen.extend((ref.region, options["rows"]) for ref in references)
        return original(x, n, references, **options)

    monkeypatch.setattr(PATCHES, "blend_references", spy)
    return seen


def test_a_region_is_cropped_with_the_area_of_a_conditioning(parts, monkeypatch):
    model, adapters, reference = parts
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    applied = apply(model, adapters, reference, mask=mask, image_guidance=1.0)
    area = comfy_nodes.ConditioningSetArea().append(make_text(model, 1), 64, 128, 64, 0, 1.0)[0]
    seen = seen_regions(monkeypatch)
    sample(applied, steps=1, positive=area + make_text(model, 3))
    by_width = {region.shape[-1]: region for region, _ in seen}
    assert set(by_width) == {8, 16}
    assert not by_width[8].any()
    assert by_width[16][..., :8].all()
    assert not by_width[16][..., 8:].any()


def test_regions_of_a_batch_follow_their_images_in_every_row(parts, monkeypatch):
    model, adapters, reference = parts
    masks = torch.zeros(3, 128, 128)
    for image in range(3):
        masks[image, :, : 32 * (image + 1)] = 1
    seen = seen_regions(monkeypatch)
    sample(apply(model, adapters, reference, mask=masks), steps=1, batch=3)
    region = seen[0][0]
    assert region.shape == (9, 16, 16)
    widths = (region.mean(dim=(1, 2)) * 4).round().int().tolist()
    assert widths == [1, 2, 3] * 3


def test_region_masks_for_another_number_of_images_are_refused_before_sampling(parts):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference, mask=torch.rand(3, 128, 128))
    with CallCounter(model) as counter, pytest.raises(CORE.InputError, match="3 region masks"):
        sample(applied, batch=2)
    assert not counter.rows


def test_a_region_mask_of_another_shape_is_stretched_and_said(parts, monkeypatch, caplog):
    model, adapters, reference = parts
    mask = torch.zeros(1, 64, 256)
    mask[..., :128] = 1
    seen = seen_regions(monkeypatch)
    sample(apply(model, adapters, reference, mask=mask), steps=1)
    region = seen[0][0]
    assert region[..., :8].all()
    assert not region[..., 8:].any()
    assert "256 x 64, was stretched to the images' shape, 128 x 128" in caplog.text


def test_a_range_follows_the_sampling_of_the_model_whatever_the_node_order(parts):
    model, adapters, reference = parts

    def zsnr(model):
        return advanced.ModelSamplingDiscrete().patch(model, "eps", True)[0]

    def rows(model):
        with CallCounter(model) as counter:
            latent = sample(model, steps=10)
        return counter.rows, latent

    before = rows(apply(zsnr(model), adapters, reference, end_percent=0.3))
    after = rows(zsnr(apply(model, adapters, reference, end_percent=0.3)))
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])


def test_a_range_that_never_acts_is_said(parts, caplog):
    model, adapters, reference = parts
    with caplog.at_level(logging.WARNING):
        shown = said_by_apply(model, adapters, reference, start_percent=0.8, end_percent=0.2)
    assert "never" in caplog.text
    assert "never" in shown


def test_perp_neg_is_said_to_take_no_image_guidance(parts, caplog):
    model = parts[0]
    guider = perpneg.Guider_PerpNeg(apply(*parts))
    guider.set_conds(make_text(model, 1), make_text(model, 2), make_text(model, 3))
    guider.set_cfg(7.5, 1.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.WARNING):
        euler = comfy.samplers.sampler_object("euler")
        out = guider.sample(
            noise, torch.zeros_like(noise), euler, sigmas, seed=1, disable_pbar=True
        )
    assert torch.isfinite(out).all()
    assert "image_guidance has no effect" in caplog.text


class AsksAgain(comfy.samplers.Sampler):
    """After a step at one noise level it asks for a prediction at another, past the guider."""

    def __init__(self, first, again):
        self.first, self.again = first, again

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *_, **__):
        model_wrap(noise, torch.tensor([self.first]), **extra_args)
        conds = [model_wrap.conds["positive"], model_wrap.conds["negative"]]
        self.predictions = comfy.samplers.calc_cond_batch(
            model_wrap.inner_model,
            conds,
            noise,
            torch.tensor([self.again]),
            extra_args["model_options"],
        )
        return noise


@pytest.mark.parametrize(("first", "again"), [(10.0, 0.1), (0.1, 10.0)])
def test_a_prediction_outside_of_a_step_goes_by_its_own_noise_level(parts, first, again):
    model, adapters, reference = parts

    def ask(model, first):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(make_text(model, 1), make_text(model, 2))
        guider.set_cfg(7.5)
        noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
        sampler, zeros = AsksAgain(first, again), torch.zeros_like(noise)
        sigmas = torch.tensor([first, 0.0])
        guider.sample(noise, zeros, sampler, sigmas, seed=1, disable_pbar=True)
        return sampler.predictions

    applied = apply(model, adapters, reference, end_percent=0.5)
    after_another, alone = ask(applied, first), ask(applied, again)
    assert all(torch.equal(*pair) for pair in zip(after_another, alone, strict=True))
    is_plain = [torch.equal(*pair) for pair in zip(alone, ask(model, again), strict=True)]
    assert is_plain == [again < 1] * 2


class NewerComfyUI:
    """Calls a wrapper as a ComfyUI that passes one argument more."""

    def __init__(self, model):
        self.class_obj = self.inner_model = model.model
        self.given, self.conds = {}, {}

    def __call__(self, *args, **kwargs):
        self.given = kwargs


@pytest.mark.parametrize("wrapper", ["predict_noise", "calc_cond_batch"])
def test_arguments_that_a_later_comfyui_adds_are_passed_on(parts, wrapper):
    model = parts[0]
    executor = NewerComfyUI(model)
    if wrapper == "predict_noise":
        executor.class_obj = executor
    wrappers = WRAPPERS.Wrappers(APPLIED.Applied((), CORE.Guidance()))
    x, sigma = torch.zeros(1, 4, 8, 8), torch.ones(1)
    options = {"transformer_options": {}}
    given = (
        (x, sigma, options)
        if wrapper == "predict_noise"
        else (model.model, [None], x, sigma, options)
    )
    getattr(wrappers, wrapper)(executor, *given, added_later=3)
    assert executor.given == {"added_later": 3}


def test_a_prediction_for_no_text_stays_none_at_all(parts):
    seen = []

    class Silent(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            rest = (x, timestep, model_options)
            seen.append(comfy.samplers.calc_cond_batch(self.inner_model, [None], *rest)[0])
            return super().predict_noise(*rest, seed)

    guider = Silent(apply(*parts))
    guider.set_conds(make_text(parts[0], 3), make_text(parts[0], 4))
    latent = torch.zeros(1, 4, 8, 8)
    sampler = comfy.samplers.sampler_object("euler")
    guider.sample(latent, latent, sampler, torch.tensor([1.0, 0.0]), seed=0, disable_pbar=True)
    assert seen
    assert not seen[0].any()


@pytest.mark.parametrize("change", ["two texts", "area", "range", "marked"])
def test_encode_takes_one_plain_text_only(parts, change):
    model, text = parts[0], make_text(parts[0], 1)
    changed = {
        "two texts": text + text,
        "area": [[text[0][0], {"area": (8, 8, 0, 0)}]],
        "range": [[text[0][0], {"start_percent": 0.0, "end_percent": 0.5}]],
        "marked": GATES.gate_conditioning(text, False),
    }[change]

    with pytest.raises(CORE.InputError, match="one plain text"):
        run(
            "DreamCacheEncode",
            model=model,
            vae=FlatVAE(),
            image=make_image(0),
            conditioning=changed,
        )


def test_an_image_with_nan_is_refused(parts):
    image = make_image(0)
    image[0, 5, 5, 1] = float("nan")
    with pytest.raises(CORE.InputError, match="NaN"):
        encode(parts[0], image=image)


def test_adapters_go_to_the_devices_of_their_model(parts):
    model, adapters, _ = parts
    other = model.clone()
    other.load_device = torch.device("meta")
    assert MODEL.adapter_patcher(adapters, other).load_device == torch.device("meta")
    assert MODEL.adapter_patcher(adapters, model).load_device == model.load_device
    assert MODEL.adapter_patcher(adapters, model) is MODEL.adapter_patcher(adapters, model.clone())


def test_adapters_count_their_bytes_for_the_output_cache(parts):
    adapters = parts[1]
    assert adapters.get_ram_usage() == 4 * sum(p.numel() for p in adapters.parameters())


def test_a_clip_with_hooks_still_encodes_the_empty_prompt(parts, caplog):
    model, text = parts[0], make_text(parts[0], 100)

    class HookedClip:
        """What ComfyUI's CLIP returns once Set CLIP Hooks has been at it: scheduled texts with hooks."""

        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, tokens):
            extra = {"hooks": object(), "start_percent": 0.0, "end_percent": 0.5}
            return [[text[0][0], {**text[0][1], **extra}], text[0]]

    with caplog.at_level(logging.WARNING):
        ours = run(
            "DreamCacheEncode", model=model, vae=FlatVAE(), image=make_image(0), clip=HookedClip()
        )[0]
    theirs = encode(model)
    assert all(torch.equal(ours.features[n], theirs.features[n]) for n in theirs.layers)
    assert "hooks" in caplog.text
