"""``DreamCachePipeline`` on tiny real diffusers pipelines, against loops written out by hand."""

import dataclasses
import gc
import sys
import weakref

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.training_utils import EMAModel
from tiny_diffusers import random_adapters
from tiny_pipeline import ddim, tiny_pipeline, tiny_sdxl_pipeline, wrap

from dreamcache_core import (
    DreamCachePipeline,
    InputError,
    Layout,
    MismatchError,
    MissingPackageError,
    ReferenceUse,
    combine_guidance,
    inject,
)
from dreamcache_core.pipeline.fused import FusedAdapters
from dreamcache_core.pipeline.loading import load_diffusers_pipeline

pytestmark = pytest.mark.diffusers

STEPS = 3
WHERE = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def any_pipe(request, tmp_path_factory):
    make = tiny_pipeline if request.param == "sd" else tiny_sdxl_pipeline
    return wrap(make(tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return wrap(tiny_pipeline(tmp_path_factory.mktemp("sd")))


@pytest.fixture
def sdxl(tmp_path):
    return wrap(tiny_sdxl_pipeline(tmp_path))


def images(count=1, height=64, width=64, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def make_use(pipe, adapters_seed=5, **options):
    cache = pipe.encode_reference(images(1, 64, 80))
    return ReferenceUse(cache, random_adapters(pipe.layout, adapters_seed), **options)


def noise(count=1, height=8, width=8, seed=0):
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(seed))


def run(pipe, use, count=1, **options):
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "negative_prompt": "bad"}
    settings["image_guidance_scale"] = 0.4  # three predictions a step
    return pipe(["a cat"] * count, use, **{**settings, **options})


def relative(ours, expected):
    return ((ours - expected).abs().max() / expected.abs().max()).item()


class Calls:
    """Counts forward passes of a module and their rows."""

    def __init__(self, module):
        self.rows = []
        self.hook = module.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _, args, kwargs):
        self.rows.append(len(args[0] if args else kwargs["sample"]))

    def __enter__(self):
        return self.rows

    def __exit__(self, *_):
        self.hook.remove()


# --- by hand


@torch.no_grad()
def encode_by_hand(pipe, prompt):
    base = pipe.pipeline
    if not pipe.is_sdxl:
        ids = base.tokenizer(
            prompt, padding="max_length", max_length=base.tokenizer.model_max_length
        ).input_ids
        return base.text_encoder(torch.tensor([ids]))[0], None
    states, pooled = [], None
    for words, encoder in (
        (base.tokenizer, base.text_encoder),
        (base.tokenizer_2, base.text_encoder_2),
    ):
        ids = words(prompt, padding="max_length", max_length=words.model_max_length).input_ids
        output = encoder(torch.tensor([ids]), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    return torch.cat(states, dim=-1), pooled


def conditions_by_hand(pooled, height, width):
    if pooled is None:
        return {}
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


@torch.no_grad()
def loop_by_hand(
    pipe,
    use,
    latents,
    size,
    guidance_scale=7.5,
    image_guidance_scale=0.4,
    guided_steps=None,
    steps=STEPS,
):
    unet, scheduler = pipe.pipeline.unet, ddim()
    texts = {text: encode_by_hand(pipe, text) for text in ("a cat", "bad")}
    scheduler.set_timesteps(steps)

    def predict(text, uses, x, t):
        states, pooled = texts[text]
        extra = conditions_by_hand(pooled, *size)
        with inject(unet, uses):
            return unet(x, t, encoder_hidden_states=states, **extra).sample

    for index, t in enumerate(scheduler.timesteps):
        terms = [
            predict(text, uses, latents, t)
            for text, uses in (("bad", []), ("bad", use), ("a cat", use))
        ]
        step_scale = image_guidance_scale if guided_steps is None or index in guided_steps else 1.0
        guided = combine_guidance(
            *terms, guidance_scale=guidance_scale, image_guidance_scale=step_scale
        )
        latents = scheduler.step(guided, t, latents).prev_sample
    return latents


def test_result_equals_a_hand_written_loop_of_three_predictions(any_pipe):
    use, start = make_use(any_pipe), noise(1, 8, 10)
    ours = run(any_pipe, use, latents=start)
    assert relative(ours, loop_by_hand(any_pipe, use, start, (64, 80))) < 1e-5


@pytest.mark.parametrize(
    ("guidance_scale", "image_guidance_scale"), [(1.0, 0.4), (3.0, 1.0), (1.0, 1.0)]
)
def test_cheaper_forms_equal_the_three_term_loop(pipe, guidance_scale, image_guidance_scale):
    use, start = make_use(pipe), noise()
    ours = run(
        pipe,
        use,
        latents=start,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
    )
    by_hand = loop_by_hand(pipe, use, start, (64, 64), guidance_scale, image_guidance_scale)
    assert relative(ours, by_hand) < 1e-5


@torch.no_grad()
# five DDIM steps are at 0.2, 0.4, 0.6, 0.8 and 1.0 of the run
@pytest.mark.parametrize(
    ("image_range", "guided_steps"),
    [((0.0, 0.5), {0, 1}), ((0.3, 0.7), {1, 2}), ((0.5, 1.0), {2, 3, 4}), ((0.0, 0.1), set())],
)
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_outside_its_range_image_guidance_is_one_and_saves_a_row(
    any_pipe, image_range, guided_steps, guidance_scale
):
    use, start = make_use(any_pipe), noise(1, 8, 10)
    options = {
        "guidance_scale": guidance_scale,
        "num_inference_steps": 5,
        "image_range": image_range,
    }
    with Calls(any_pipe.pipeline.unet) as rows:
        ours = run(any_pipe, use, latents=start, **options)
    fewest = 1 if guidance_scale == 1 else 2
    assert rows == [3 if step in guided_steps else fewest for step in range(5)]
    by_hand = loop_by_hand(
        any_pipe, use, start, (64, 80), guidance_scale, guided_steps=guided_steps, steps=5
    )
    assert relative(ours, by_hand) < 1e-5


def test_reference_equals_the_specification_by_hand(any_pipe):
    image = images(1, 64, 80)
    cache = any_pipe.encode_reference(image, seed=11)
    base = any_pipe.pipeline
    pixels = image.permute(0, 3, 1, 2) * 2 - 1
    latent = base.vae.encode(pixels).latent_dist.mode() * base.vae.config.scaling_factor
    alpha = base.scheduler.alphas_cumprod[1]
    drawn = torch.randn(1, 4, 8, 10, generator=torch.Generator().manual_seed(11))
    states, pooled = encode_by_hand(any_pipe, "")
    seen = []
    hook = base.unet.mid_block.attentions[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    noised = alpha.sqrt() * latent + (1 - alpha).sqrt() * drawn
    extra = conditions_by_hand(pooled, 64, 80)
    base.unet(noised, torch.tensor(1), encoder_hidden_states=states, **extra)
    hook.remove()
    torch.testing.assert_close(cache.features["middle_block.1"], seen[0], rtol=1e-5, atol=1e-6)
    assert (cache.seed, cache.timestep, cache.latent_size) == (11, 1, (8, 10))


# --- the reference


def test_an_image_gives_the_same_features_whatever_is_encoded_with_it(pipe):
    both, state = pipe.encode_reference(images(2), seed=3), torch.random.get_rng_state()
    alone = [pipe.encode_reference(image[None], seed=3) for image in images(2)]
    for layer, feature in both.features.items():
        assert torch.equal(feature, torch.cat([cache.features[layer] for cache in alone]))
    assert torch.equal(state, torch.random.get_rng_state())


def test_seed_and_prompt_of_the_reference_matter(pipe):
    layer = "middle_block.1"
    first, other, told = (
        pipe.encode_reference(images(), **options).features[layer]
        for options in ({}, {"seed": 1}, {"prompt": "dog"})
    )
    assert not torch.equal(first, other)
    assert not torch.equal(first, told)


def test_reference_is_encoded_for_the_adapters_that_will_use_it(tmp_path):
    layers = {"middle_block.1": 128, "output_blocks.5.1": 128}
    adapters = random_adapters(Layout(64, layers), timestep=20)
    pipe = wrap(tiny_pipeline(tmp_path))
    with pytest.raises(MismatchError, match=r"encode_reference\(image, adapters=adapters\)"):
        ReferenceUse(pipe.encode_reference(images()), adapters)
    told = pipe.encode_reference(images(), adapters=adapters)
    with_own = DreamCachePipeline(pipe.pipeline, adapters)
    for reference in (told, with_own.encode_reference(images())):
        assert (reference.layers, reference.timestep) == (tuple(layers), 20)
    assert with_own.use_reference(images()).reference.layers == tuple(layers)
    by_hand = with_own.encode_reference(images(), timestep=3, layers=["middle_block.1"])
    assert (by_hand.layers, by_hand.timestep) == (("middle_block.1",), 3)


def test_mask_marks_the_subject_tokens_of_each_image(pipe):
    mask = torch.zeros(2, 64, 64)
    mask[0, :32], mask[1, :, 32:] = 1, 1
    cache = pipe.encode_reference(images(2), mask=mask)
    tokens = cache.masks["output_blocks.10.1"]
    assert tokens.shape == (2, 8, 8)
    assert tokens[0, :4].all()
    assert not tokens[0, 4:].any()
    assert tokens[1, :, 4:].all()
    assert not tokens[1, :, :4].any()


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (torch.rand(1, 60, 64, 3), {}, "multiples of 8"),
        (torch.rand(1, 64, 64, 4), {}, "multiples of 8"),
        (torch.rand(1, 64, 64, 3) * 255, {}, r"\[0, 1\]"),
        (torch.rand(1, 64, 64, 3), {"timestep": 1000}, "999"),
        (torch.rand(1, 64, 64, 3), {"seed": -1}, "seed"),
        (torch.rand(1, 64, 64, 3), {"mask": torch.ones(3, 64, 64)}, "one for each"),
        (torch.rand(1, 64, 64, 3), {"mask": torch.ones(1, 64, 128)}, "aspect"),
        (torch.rand(1, 64, 64, 3), {"mask": torch.zeros(1, 64, 64)}, "empty"),
    ],
)
def test_bad_reference_images_are_refused(pipe, image, options, message):
    with pytest.raises(InputError, match=message):
        pipe.encode_reference(image, **options)


# --- the number of passes


def test_reference_runs_once_for_all_steps_and_images(pipe):
    with Calls(pipe.pipeline.unet) as rows:
        use = make_use(pipe)
        run(pipe, use, count=2, num_inference_steps=4)
    assert rows == [1, 6, 6, 6, 6]


def test_keys_and_values_are_computed_once_per_run(pipe):
    use = make_use(pipe)
    fused = use.adapters.fuse()
    with Calls(fused["middle_block.1"].to_k) as keys, Calls(fused["middle_block.1"].to_q) as steps:
        run(pipe, ReferenceUse(use.reference, fused), num_inference_steps=4)
    assert (len(keys), len(steps)) == (1, 4)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 3),
        ({"guidance_scale": 1.0}, 3),
        ({"image_guidance_scale": 1.0}, 2),
        ({"guidance": "joint"}, 2),
        ({"guidance_scale": 1.0, "image_guidance_scale": 1.0}, 1),
        ({"guidance_scale": 1.0, "guidance": "joint"}, 1),
    ],
)
def test_one_call_per_step_with_no_more_rows_than_needed(pipe, options, rows):
    use = make_use(pipe)
    with Calls(pipe.pipeline.unet) as counted:
        run(pipe, use, **options)
    assert counted == [rows] * STEPS


def test_the_default_takes_two_predictions_a_step(pipe):
    use = make_use(pipe)
    with Calls(pipe.pipeline.unet) as counted:
        pipe("a cat", use, num_inference_steps=STEPS, output_type="latent")
    assert counted == [2] * STEPS


# --- identity


@pytest.mark.parametrize("inactive", ["scale 0", "empty mask", "no use"])
def test_without_an_active_use_the_result_is_the_plain_pipelines(any_pipe, inactive):
    # same batching (negative, prompt) in both: bit for bit
    uses = {
        "scale 0": lambda: make_use(any_pipe, scale=0.0),
        "empty mask": lambda: make_use(any_pipe, mask=torch.zeros(8, 8)),
        "no use": lambda: [],
    }[inactive]()
    start = noise(2)
    ours = run(any_pipe, uses, latents=start, count=2)
    plain = any_pipe.pipeline(
        ["a cat"] * 2,
        negative_prompt=["bad"] * 2,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        latents=start,
        output_type="latent",
        height=64,
        width=64,
    ).images
    assert torch.equal(ours, plain)


def test_images_equal_the_plain_pipelines_and_the_reference_changes_them(pipe):
    options = {"generator": torch.Generator().manual_seed(4), "output_type": "pt"}
    ours = run(pipe, make_use(pipe, scale=0.0), **options)
    options["generator"].manual_seed(4)
    plain = pipe.pipeline(
        "a cat", negative_prompt="bad", num_inference_steps=STEPS, **options
    ).images
    assert torch.equal(ours, plain)
    options["generator"].manual_seed(4)
    assert not torch.equal(run(pipe, make_use(pipe), **options), plain)


def test_nothing_stays_behind_after_a_run_or_an_exception(pipe):
    use = make_use(pipe)

    def stop(step, timestep, latents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, use, callback=stop)
    run(pipe, use)
    hooks = [
        module
        for module in pipe.pipeline.unet.modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    assert hooks == []


# --- batches, seeds, sizes, several uses


def test_an_image_of_a_batch_equals_that_image_alone(any_pipe):
    use = make_use(any_pipe)

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    batch = run(any_pipe, use, count=3, generator=generators(7, 8, 9))
    alone = run(any_pipe, use, generator=generators(8))
    assert relative(batch[1:2], alone) < 1e-4


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_ancestral_noise_comes_from_each_images_own_generator(pipe):
    use, before = make_use(pipe), pipe.pipeline.scheduler
    pipe.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(before.config)
    try:
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        batch = run(pipe, use, generator=seeds, count=2)
        alone = run(pipe, use, generator=torch.Generator().manual_seed(2))
    finally:
        pipe.pipeline.scheduler = before
    assert relative(batch[1:2], alone) < 1e-4


def test_several_prompts_give_the_images_in_order(pipe):
    use, start = make_use(pipe), noise(2)
    both = pipe(
        ["a cat", "dog"], use, latents=start, num_inference_steps=STEPS, output_type="latent"
    )
    second = pipe("dog", use, latents=start[1:], num_inference_steps=STEPS, output_type="latent")
    assert relative(both[1:], second) < 1e-4


def test_region_masks_of_several_images_reach_their_own_image(pipe):
    start = noise(2)
    mask = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    batch = run(pipe, make_use(pipe, mask=mask), count=2, latents=start)
    with_reference = run(pipe, make_use(pipe), latents=start[1:])
    # an empty region: e_c is e_u, so the three-term rule is ordinary guidance
    without = run(pipe, [], latents=start[:1])
    assert relative(batch[1:], with_reference) < 1e-4
    assert relative(batch[:1], without) < 1e-4


def test_several_uses_each_with_its_own_adapters(pipe):
    start = noise()
    uses = [make_use(pipe, 5), make_use(pipe, 6, scale=0.5)]
    ours = run(pipe, uses, latents=start)
    assert relative(ours, loop_by_hand(pipe, uses, start, (64, 64))) < 1e-5


def test_output_types_sizes_and_callback(pipe):
    use, steps = make_use(pipe), []
    images = run(
        pipe,
        use,
        output_type="pil",
        height=72,
        width=88,
        callback=lambda step, timestep, latents: steps.append((step, timestep)),
    )
    assert images[0].size == (88, 72)
    assert [step for step, _ in steps] == [0, 1, 2]
    assert steps[0][1] > steps[-1][1]
    tensor = run(pipe, use, output_type="pt")
    assert tensor.shape == (1, 3, 64, 64)
    assert tensor.min() >= 0
    assert tensor.max() <= 1


# --- adapters


def step_fused_adamw(adapters):
    weight = adapters["middle_block.1"].to_v.weight.requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], fused=True).step()


def copy_moving_average(adapters):
    averaged = EMAModel([p + 1 for p in adapters.parameters()])
    averaged.copy_to(adapters.parameters())


WEIGHT_CHANGES = {
    "in place": lambda adapters: adapters["middle_block.1"].to_v.weight.add_(1),
    "past autograd": lambda adapters: adapters["middle_block.1"].to_v.weight.data.add_(1),
    "fused AdamW": step_fused_adamw,
    "EMAModel.copy_to": copy_moving_average,
    "rows exchanged": lambda adapters: adapters["middle_block.1"].to_v.weight.data.copy_(
        adapters["middle_block.1"].to_v.weight.data.flip(0)
    ),
    "data replaced": lambda adapters: setattr(
        adapters["middle_block.1"].to_v.weight, "data", torch.ones(128, 128)
    ),
    "float type": lambda adapters: adapters.double(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", WEIGHT_CHANGES)
@pytest.mark.parametrize("is_inference", [False, True])
def test_changed_weights_are_fused_anew_whatever_changed_them(pipe, change, is_inference):
    use, fused = make_use(pipe), FusedAdapters()
    first = fused.ready(use, **WHERE).adapters
    assert fused.ready(use, **WHERE).adapters is first
    assert fused.ready(make_use(pipe), **WHERE).adapters is not first
    with torch.inference_mode(is_inference):
        WEIGHT_CHANGES[change](use.adapters)
    anew = fused.ready(use, **WHERE).adapters
    expected = use.adapters.fuse().state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in anew.state_dict().items())


def test_fused_adapters_do_not_outlive_the_set_they_came_from(pipe):
    use, fused = make_use(pipe), FusedAdapters()
    one = weakref.ref(fused.ready(use, **WHERE).adapters)
    assert one() is not None
    del use
    gc.collect()
    assert one() is None


def test_fused_adapters_of_the_right_type_are_used_as_they_are(pipe):
    use = make_use(pipe)
    fused = ReferenceUse(use.reference, use.adapters.fuse())
    assert FusedAdapters().ready(fused, **WHERE) is fused
    start = noise()
    assert torch.equal(run(pipe, fused, latents=start), run(pipe, use, latents=start))


def test_half_precision_model_gets_half_precision_adapters(tmp_path):
    pipe = wrap(tiny_pipeline(tmp_path).to(torch.bfloat16))
    use = make_use(pipe)
    out = run(pipe, use)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    half = {"device": pipe.device, "dtype": pipe.dtype}
    for given in (use, ReferenceUse(use.reference, use.adapters.fuse())):
        ready = FusedAdapters().ready(given, **half)
        assert {p.dtype for p in ready.adapters.parameters()} == {torch.bfloat16}


def test_a_v_prediction_model_under_epsilon_adapters_is_warned_of_once(tmp_path, caplog):
    base = tiny_pipeline(tmp_path)
    base.scheduler = ddim(prediction_type="v_prediction")
    pipe = wrap(base)
    use = make_use(pipe)
    for _ in range(2):
        run(pipe, use)
    warned = [r.message for r in caplog.records if "v_prediction" in r.message]
    assert len(warned) == 1


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 63}, "multiples of 8"),
        ({"latents": noise(2)}, "latents of"),
        ({"generator": [torch.Generator()] * 2}, "generator"),
        ({"num_inference_steps": 0}, "num_inference_steps must be in 1"),
        ({"output_type": "np"}, "output_type"),
        ({"guidance": "both"}, "guidance"),
        ({"image_range": (0.6, 0.5)}, "start before its end; given 0.6 to 0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"negative_prompt": ["a", "b"]}, "negative"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "half precision"),
    ],
)
def test_bad_arguments_are_refused(pipe, options, message):
    use = make_use(pipe)
    with pytest.raises(InputError, match=message):
        run(pipe, use, **options)


def test_no_negative_prompt_is_the_empty_one_and_numbers_may_be_numpys(pipe):
    use, own = make_use(pipe), {"guidance_scale": 2.0, "image_guidance_scale": 0.5}
    expected = run(pipe, use, latents=noise(1), negative_prompt="", **own)
    numpys = {name: np.float32(value) for name, value in own.items()}
    drawn = run(pipe, use, latents=noise(1), negative_prompt=None, **numpys)
    assert relative(drawn, expected) < 1e-6


def test_region_masks_of_another_number_are_refused(pipe):
    use = make_use(pipe, mask=torch.rand(3, 8, 8))
    with pytest.raises(InputError, match="each of the 1 images"):
        run(pipe, use)


def test_a_reference_of_another_model_is_refused(pipe, sdxl):
    with pytest.raises(MismatchError):
        run(pipe, make_use(sdxl))


def test_without_diffusers_the_error_names_the_extra(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingPackageError, match=r"dreamcache\[diffusers\]"):
        DreamCachePipeline(pipe.pipeline)


def test_half_precision_folders_are_loaded(tmp_path):
    tiny_pipeline(tmp_path).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    loaded = load_diffusers_pipeline(tmp_path / "half", dtype=torch.float16)
    assert loaded.unet.dtype == torch.float16
    assert loaded.safety_checker is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uses": None}, "Expected uses to be a ReferenceUse"),
        ({"prompt": None}, "Expected a prompt"),
        ({"prompt": ["a", None]}, "Expected a prompt or a list"),
        ({"prompt": b"a dog"}, "Expected a prompt or a list"),
        ({"prompt": "a \ud800"}, "Expected a prompt or a list"),
        ({"negative_prompt": [1]}, "Expected a prompt or a list"),
        ({"num_inference_steps": 1001}, r"1 \.\.\. 1000"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt must be a whole number"),
        ({"height": 64.0}, "height must be a whole number"),
        ({"generator": 42}, "Expected a torch.Generator"),
        ({"generator": [None]}, "Expected a torch.Generator"),
        ({"guidance_scale": None}, "guidance_scale must be a finite number; given None"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "Expected latents to be a tensor; given ndarray"),
        ({"image_range": None}, "two numbers; given None"),
        ({"image_range": (0,)}, "two numbers"),
        ({"callback": 1}, "callback must be a function"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(pipe, changes, message):
    arguments = {"prompt": "a dog", "uses": [], **changes}
    with pytest.raises(InputError, match=message):
        pipe(**arguments)


def test_reference_for_adapters_has_their_layers_and_timestep(pipe):
    layout = Layout(pipe.layout.context_width, dict(list(pipe.layout.channels.items())[1:]))
    adapters = random_adapters(layout)
    adapters.info = dataclasses.replace(adapters.info, timestep=40)
    reference = pipe.encode_reference(images(), adapters=adapters)
    assert reference.layout == layout
    assert reference.timestep == 40
    alone = pipe.encode_reference(images(), layers=layout.layers, timestep=40)
    assert all(torch.equal(f, alone.features[name]) for name, f in reference.features.items())
