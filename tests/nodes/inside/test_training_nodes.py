"""The nodes that train and save adapters."""

import json
import shutil
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.sd
import comfy.utils
import comfy_extras.nodes_model_advanced as model_nodes
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    CORE,
    IS_DYNAMIC,
    FlatVAE,
    apply,
    assert_close,
    encode,
    lora_weights,
    make_image,
    make_model,
    make_text,
    pack_module,
    run,
    run_options,
    said,
    sample,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

import nodes as comfy_nodes

FROZEN, SET = (pack_module(f"nodes.host.training.{file}") for file in ("frozen_model", "images"))
INJECTED, ORDER, AUGMENTATION, BUCKETS = (
    pack_module(f"dreamcache_core.{file}")
    for file in ("training.injected_unet", "data.order", "data.augmentation", "data.buckets")
)
SITES = pack_module("dreamcache_core.method.backends").select_sites
NODES = pack_module("nodes").__name__
Interrupted = comfy.model_management.InterruptProcessingException
NODE = comfy_nodes.NODE_CLASS_MAPPINGS["DreamCacheTrainAdapters"]
FOLDER = Path(folder_paths.get_folder_paths("dreamcache")[0])
LISTS = ("images", "masks", "captions", "conditioning")


@dataclass
class TinyClip:
    """A CLIP whose text states are random, but always the same for the same text."""

    model: Any

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        return make_text(self.model, zlib.crc32(tokens.encode()))


def train(model: Any, **inputs: Any) -> tuple[Any, torch.Tensor]:
    """Run the node as a graph does: every input in a list."""
    given = {
        "vae": FlatVAE(),
        "clip": TinyClip(model),
        "images": [make_image(1, batch=2)],
        "captions": ["a red dog\na blue cat"],
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "seed": 0,
        "init": "identity",
        "resolution": 64,
        **inputs,
    }
    lists = {k: v if k in LISTS else [v] for k, v in given.items()}
    return NODE.execute(model=[model], **lists).result


def with_unet(model: Any) -> tuple[Any, Any]:
    """A MODEL and the U-Net that training calls: with dynamic VRAM one of its own, which is read beforehand here."""
    if not IS_DYNAMIC:
        return model, model.model.diffusion_model
    clone = model.clone()
    loaded = clone.cached_patcher_init[0](disable_dynamic=True)
    clone.cached_patcher_init = (lambda **_: loaded, ())
    return clone, loaded.model.diffusion_model


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return make_model()


@pytest.fixture(scope="module")
def trained(model):
    """Two steps with the default inputs."""
    with torch.inference_mode():
        return train(model)[0]


@pytest.fixture(autouse=True)
def tidy():
    """Leave the folder of adapters as it was."""
    yield
    shutil.rmtree(FOLDER / "mine", ignore_errors=True)
    for path in kept_files():
        path.unlink()


def weights(adapters: Any) -> dict[str, torch.Tensor]:
    return adapters.state_dict()


def same(one: Any, other: Any, **tolerance: float) -> bool:
    mine, theirs = weights(one), weights(other)
    if tolerance:
        return all(torch.allclose(mine[k], theirs[k], **tolerance) for k in mine)
    return all(torch.equal(mine[k], theirs[k]) for k in mine)


def record(adapters: Any) -> dict[str, Any]:
    return json.loads(adapters.info.extra["training"])


def kept_files() -> set[Path]:
    return set(FOLDER.glob("dreamcache-interrupted*.safetensors"))


def test_only_the_adapters_learn(model):
    unet = model.model.diffusion_model
    before = {name: (p, p.clone(), p.requires_grad) for name, p in unet.named_parameters()}
    untrained = train(model, learning_rate=1e-7, steps=1)[0]
    adapters, curve = train(model)
    for name, parameter in weights(adapters).items():
        assert not torch.equal(parameter, weights(untrained)[name]), name
        assert (parameter.dtype, parameter.device.type) == (torch.float32, "cpu")
    for parameter in adapters.parameters():
        assert not parameter.is_inference()
        assert parameter.grad is None
        assert not parameter.requires_grad
    for name, parameter in unet.named_parameters():
        kept, value, requires_grad = before[name]
        assert parameter is kept
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is None
    assert curve.shape == (1, 360, 640, 3)


def test_the_model_is_left_as_it_was(model):
    options = dict(model.model_options["transformer_options"])
    train(model, gradient_checkpointing=True)
    assert model.model_options["transformer_options"] == options
    assert not model.object_patches
    assert not any(model.wrappers.values())
    for module in model.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def v_model(kind):
    return model_nodes.ModelSamplingDiscrete().patch(make_model(kind), "v_prediction", False)[0]


def tall_and_wide_masks(height, width):
    """Two masks whose subjects differ in place, size and shape."""
    masks = torch.zeros((2, height, width))
    masks[0, height // 4 :, : width // 3] = 1
    masks[1, : height // 2, width // 4 :] = 1
    return masks


def encode_set(clip, images, masks, captions, **settings):
    pairs, _ = SET.make_pairs(images, masks, captions, "subject")
    texts = [clip.encode_from_tokens_scheduled(text) for text in (*captions, "")]
    settings = {"has_buckets": False, "resolution": 64, "channels": 4, **settings}
    return SET.encode_pairs(pairs, texts, FlatVAE(), show=lambda *_: None, **settings)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: make_model("sd15"), {"caption_dropout": 0.0}),
        (lambda: make_model("sd15"), {"caption_dropout": 1.0}),
        (lambda: v_model("sd21"), {"caption_dropout": 0.0}),
        (lambda: make_model("sdxl"), {"caption_dropout": 0.0, "buckets": True, "resolution": 192}),
    ],
    ids=["noise", "dropout", "v", "sdxl in buckets"],
)
def test_the_loss_is_the_one_of_the_method(make, inputs):
    """That of the second epoch, row by row with the U-Net called directly, and written as METHOD.md has it."""
    model, seed, captions = make(), 4, ["a red dog", "a blue cat"]
    images, masks = make_image(3, 64, 128, batch=2), tall_and_wide_masks(64, 128)
    adapters = train(
        model, images=[images], masks=[masks], captions=captions, steps=2, seed=seed,
        learning_rate=1e-7, init="paper", **inputs,
    )[0]  # fmt: skip
    with torch.inference_mode(False), torch.no_grad():
        schedule = FROZEN.noise_schedule(model)
        assert schedule.prediction == ("v_prediction" if model.object_patches else "epsilon")
        data = encode_set(
            TinyClip(model),
            [images],
            [masks],
            captions,
            resolution=inputs.get("resolution", 64),
            has_buckets=inputs.get("buckets", False),
            num_variants=2,
            seed=seed,
        )
        module = INJECTED.InjectedUNet(model.model.diffusion_model, adapters)
        order, losses = ORDER.SampleOrder(2, seed), []
        for position in (2, 3):
            epoch, index = order(position)
            assert epoch == 1
            z, r = (
                model.model.process_latent_in(x)
                for x in (data.targets[index], data.references[index][1])
            )
            generator = torch.Generator().manual_seed(ORDER.sample_seed(seed, position))
            t = torch.randint(400, 1000, (1,), generator=generator)
            torch.rand((), generator=generator)
            noise, reference_noise = (torch.randn(x.shape, generator=generator) for x in (z, r))
            is_dropped = inputs["caption_dropout"] == 1
            text = text_inputs(model, data.texts[-1 if is_dropped else index], z)
            empty = text_inputs(model, data.texts[-1], r)
            noised = schedule.add_noise(r, reference_noise, torch.tensor([300]))
            cache = module.capture(noised, empty.pop("context"), empty)
            x_t = schedule.add_noise(z, noise, t)
            with module.until_backward():
                prediction = module(cache, x_t, t, text.pop("context"), text)
            abar = 1 / (model.get_model_object("model_sampling").sigmas[t] ** 2 + 1)
            v = abar.sqrt() * noise - (1 - abar).sqrt() * z
            target = v if schedule.prediction == "v_prediction" else noise
            losses.append((prediction - target).square().mean())
    assert record(adapters)["loss"] == pytest.approx(float(sum(losses) / 2), rel=1e-4)


def text_inputs(model, conditioning, latent):
    """What ComfyUI hands a U-Net with a text, for an image of a latent's size."""
    ((states, options),) = conditioning
    conds = model.model.extra_conds(
        cross_attn=states,
        noise=latent,
        device=latent.device,
        height=8 * latent.shape[-2],
        width=8 * latent.shape[-1],
        prompt_type="positive",
        **options,
    )
    return {"context": conds.pop("c_crossattn").cond, **{k: v.cond for k, v in conds.items()}}


def test_each_image_is_encoded_with_its_own_mask_in_its_own_bucket(model):
    images = [make_image(1, 64, 128), make_image(2, 128, 64)]
    masks = [tall_and_wide_masks(64, 128)[:1], tall_and_wide_masks(128, 64)[1:]]
    data = encode_set(
        TinyClip(model), images, masks, ["a dog", "a cat"],
        resolution=192, has_buckets=True, num_variants=3, seed=4,
    )  # fmt: skip
    assert [tuple(target.shape) for target in data.targets] == [(1, 4, 16, 32), (1, 4, 32, 16)]
    seen = []
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        height, width = 2 * image.shape[1], 2 * image.shape[2]
        target = BUCKETS.crop_target(image, height, width)
        assert torch.equal(data.targets[index], FlatVAE().encode(target))
        assert len(data.references[index]) == 3
        for variant, reference in enumerate(data.references[index]):
            place = ORDER.sample_seed(5, 2 * variant + index)
            generator = torch.Generator().manual_seed(place)
            expected = AUGMENTATION.augment_reference(image, mask, size=192, generator=generator)
            assert torch.equal(reference, FlatVAE().encode(expected))
            seen.append(reference)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    clip = TinyClip(model)
    for text, caption in zip(data.texts, ["a dog", "a cat", ""], strict=True):
        assert torch.equal(text[0][0], clip.encode_from_tokens_scheduled(caption)[0][0])


def test_pairs_hold_images_masks_and_captions_in_order():
    images, masks = make_image(1, 32, 64, batch=2), tall_and_wide_masks(32, 64)
    (one, two), _ = SET.make_pairs([images], [1 - masks], ["a dog", "a cat"], "background")
    for index, (pair, caption) in enumerate([(one, "a dog"), (two, "a cat")]):
        assert torch.equal(pair.target[0], images[index])
        assert torch.equal(pair.subject[0], images[index])
        assert torch.equal(pair.mask[0], masks[index])
        assert pair.caption == caption


def test_small_masks_are_enlarged_as_those_of_files_are(model):
    """Smoothly, as the reference image is made, and not pixel by pixel."""
    image, mask = make_image(1, 64, 128), tall_and_wide_masks(16, 32)[1:]
    data = encode_set(TinyClip(model), [image], [mask], ["a dog"], num_variants=1, seed=4)
    generator = torch.Generator().manual_seed(ORDER.sample_seed(5, 0))
    expected = AUGMENTATION.augment_reference(image, mask, size=64, generator=generator)
    assert torch.equal(data.references[0][0], FlatVAE().encode(expected))


class LoudVAE(FlatVAE):
    """A VAE of latents so large that the gradients of a model that predicts v are, too."""

    def encode(self, pixels):
        return 1000 * super().encode(pixels)


def test_gradients_are_clipped_to_a_norm_of_one():
    norms = []

    def note(optimizer, *_):
        gradients = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
        norms.append(float(torch.cat(gradients).norm()))

    handle = register_optimizer_step_pre_hook(note)
    try:
        train(v_model("sd21"), vae=LoudVAE(), init="paper")
    finally:
        handle.remove()
    assert norms == pytest.approx([1, 1], rel=1e-4)


def test_the_loss_falls_when_two_images_are_learned_by_heart(model):
    """Below that of predicting nothing, 1, which a U-Net of random weights is above."""
    inputs = {"steps": 25, "caption_dropout": 0.0}
    untrained = record(train(model, learning_rate=1e-7, **inputs)[0])["loss"]
    learned = record(train(model, learning_rate=1e-2, **inputs)[0])["loss"]
    assert learned < 1 < untrained


def test_the_same_inputs_and_seed_give_the_same_adapters(model, trained):
    state = torch.random.get_rng_state()
    assert same(train(model)[0], trained)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not same(train(model, seed=1)[0], trained)


def test_adapters_that_have_not_learned_are_the_plain_model(model, trained):
    reference, plain = encode(model), sample(model)
    untrained = train(model, steps=1, learning_rate=1e-7)[0]
    assert_close(sample(apply(model, untrained, reference)), plain, 1e-4)
    learned = sample(apply(model, trained, reference))
    assert learned.isfinite().all()
    assert (learned - plain).abs().max() > 1e-3 * plain.abs().max()


def test_a_start_from_self_attention_has_its_weights_and_is_the_plain_model(model):
    started = train(model, init="self_attention", learning_rate=1e-7, steps=1)[0]
    random = train(model, learning_rate=1e-7, steps=1)[0]
    for name, site in SITES(model.model.diffusion_model, started.layers).items():
        own, keys = site.block.attn1, started[name].to_k.weight
        assert torch.equal(started[name].to_q.weight, own.to_q.weight)
        assert_close(started[name].to_out.weight, own.to_out[0].weight, 1e-6)
        assert not torch.allclose(keys, random[name].to_k.weight, atol=1e-2)
        assert not any(m._forward_pre_hooks for m in (site.module, own))
    assert_close(sample(apply(model, started, encode(model))), sample(model), 1e-4)
    assert record(started)["init"] == "self_attention"


def test_a_start_from_self_attention_can_be_interrupted(model, monkeypatch):
    started = []
    original = FROZEN.FrozenModel.predict

    def predict(self, *given, **texts):
        started.append(len(given[0]))
        comfy.model_management.interrupt_current_processing()
        return original(self, *given, **texts)

    monkeypatch.setattr(FROZEN.FrozenModel, "predict", predict)
    with pytest.raises(Interrupted):
        train(model, init="self_attention", steps=9)
    assert started == [1]
    assert kept_files() == set()


if not IS_DYNAMIC:  # where training reads weights of its own

    def test_weights_loaded_in_inference_mode_train_as_plain_ones(model, trained):
        assert all(p.is_inference() for p in model.model.diffusion_model.parameters())
        with torch.inference_mode(False):
            plain = make_model()
        weights = list(plain.model.diffusion_model.parameters())
        requires_grad = [weight.requires_grad for weight in weights]
        assert not any(weight.is_inference() for weight in weights)
        assert same(train(plain)[0], trained)
        assert [weight.requires_grad for weight in weights] == requires_grad
        assert all(p.is_inference() for p in model.model.diffusion_model.parameters())


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for backward."""

    def __init__(self) -> None:
        self.count = 0
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count += tensor.nbytes
        return tensor


def test_gradient_checkpointing_saves_memory_and_changes_nothing(model, trained):
    plain, checkpointed = SavedBytes(), SavedBytes()
    with plain:
        train(model)
    with checkpointed:
        adapters = train(model, gradient_checkpointing=True)[0]
    assert same(adapters, trained, rtol=0, atol=1e-6)
    assert 0 < checkpointed.count < plain.count / 4


def test_the_encoder_builds_no_graph(model):
    (model, unet), has_graph = with_unet(model), {"encoder": set(), "decoder": set()}
    parts = {"encoder": unet.input_blocks[-1][-1], "decoder": unet.output_blocks[-1][0]}
    hooks = [
        module.register_forward_hook(lambda *a, n=name: has_graph[n].add(a[-1].requires_grad))
        for name, module in parts.items()
    ]
    train(model)
    for hook in hooks:
        hook.remove()
    assert has_graph == {"encoder": {False}, "decoder": {True}}


def test_a_lora_on_the_model_counts_and_stays_on_it(model, trained):
    key = "diffusion_model.output_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"
    weight = comfy.utils.get_attr(model.model, key)
    before, patched = weight.clone(), model.clone()
    patched.add_patches({key: (torch.ones_like(weight),)}, 0.5)
    assert not same(train(patched)[0], trained)
    assert patched.patches
    comfy.model_management.unload_all_models()
    assert torch.equal(comfy.utils.get_attr(model.model, key), before)


if hasattr(comfy.sd, "load_bypass_lora_for_models") and not IS_DYNAMIC:

    def test_a_lora_in_bypass_mode_trains_as_the_same_lora_on_the_weights(model, trained):
        loads = (comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models)
        usual, bypassing = (load(model, None, lora_weights(), 1.0, 0.0)[0] for load in loads)
        before = sample(bypassing)
        first, second = (weights(train(model)[0]) for model in (bypassing, usual))
        # Adam makes whole steps of gradients that are nothing but rounding
        apart, from_plain = (
            sum((first[name] - other[name]).abs().sum() for name in first)
            for other in (second, weights(trained))
        )
        assert apart < 1e-3 * from_plain
        assert torch.equal(sample(bypassing), before)
        assert same(train(model)[0], trained)


def test_kernels_without_gradients_are_not_used(model, trained, monkeypatch):
    @comfy.ldm.modules.attention.wrap_attn
    def no_gradient(*_, **__):
        raise AssertionError("called")

    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", no_gradient)
    assert same(train(model)[0], trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "manual_cast"),
    [(torch.bfloat16, None), (torch.float16, torch.float32), (torch.float16, None)],
)
def test_half_precision_models_train_adapters_in_float32(dtype, manual_cast):
    model = make_model(dtype=dtype, manual_cast=manual_cast)
    adapters = train(model)[0]
    untrained = train(model, learning_rate=1e-7)[0]
    for name, parameter in weights(adapters).items():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, weights(untrained)[name]), name


def test_sdxl_trains_on_images_of_different_sizes():
    model = make_model("sdxl")
    images = [make_image(1, 64, 256), make_image(2, 128, 128), make_image(3, 256, 64)]
    captions = ["a dog", "a cat", "a bird"]
    inputs = {"images": images, "captions": captions, "steps": 3, "resolution": 192}
    adapters = train(model, **inputs, buckets=True, batch_size=1)[0]
    assert adapters.family == "sdxl"
    assert record(adapters)["images"] == 3
    assert not same(adapters, train(model, **inputs, batch_size=1)[0])
    assert sample(apply(model, adapters, encode(model))).isfinite().all()


def test_a_mask_cuts_the_subject_out(model, trained):
    mask = torch.zeros((2, 128, 128))
    mask[0, 32:96, 16:80], mask[1, 64:112, 64:] = 1, 1
    masked = train(model, masks=[mask])[0]
    assert not same(masked, trained)
    assert record(masked)["masks"] == 2
    assert same(train(model, masks=[1 - mask], mask_marks="background")[0], masked)
    assert same(train(model, masks=[1 - mask])[0], masked)
    assert same(train(model, masks=list(mask))[0], masked)
    alpha = [torch.cat([make_image(1, batch=2), mask[..., None]], dim=-1)]
    assert same(train(model, images=alpha)[0], masked)


def test_what_was_made_of_masks_is_said(model, caplog):
    mask = torch.zeros((2, 128, 128))
    mask[0, :32] = 1
    mask[0, :, :32] = 1
    mask[0, 96:] = 1
    pairs, notes = SET.make_pairs([make_image(1, batch=2)], [mask], ["a dog", "a cat"], "auto")
    assert notes == [
        "the mask was turned round (1 of 2 images)",
        "the mask is empty (1 of 2 images)",
    ]
    assert torch.equal(pairs[0].mask, 1 - mask[:1])
    assert pairs[1].mask is None
    assert "1 of 2 training images have no mask" in caplog.text


def test_masks_that_mark_everything_are_no_masks(model, trained, caplog):
    full = torch.ones((2, 128, 128))
    opaque = [torch.cat([make_image(1, batch=2), full[..., None]], dim=-1)]
    for inputs in (
        {"masks": [full]},
        {"masks": [1 - full], "mask_marks": "background"},
        {"images": opaque},
    ):
        caplog.clear()
        adapters = train(model, **inputs)[0]
        assert same(adapters, trained)
        assert record(adapters)["masks"] == 0
        assert "2 of 2 training images have no mask" in caplog.text
        assert "cut-outs" not in caplog.text


def test_hidden_pixels_of_cut_outs_are_warned_about(caplog):
    alpha = torch.ones((2, 64, 64, 1))
    alpha[1, :, :32] = 0
    images = torch.cat([make_image(1, 64, 64, batch=2), alpha], dim=-1)
    SET.make_pairs([images], [], ["a dog", "a cat"], "subject")
    assert "1 of 2 training images are cut-outs" in caplog.text
    assert "1 of 2 training images have no mask" in caplog.text


def test_the_placeholder_of_load_image_is_no_mask(model, trained):
    assert same(train(model, masks=[torch.zeros((1, 64, 64))])[0], trained)
    assert same(train(model, masks=[torch.zeros((64, 64))] * 2)[0], trained)


@pytest.mark.parametrize(
    "texts",
    [
        {"captions": ["a red dog", "a blue cat"]},
        {"captions": ["\n a red  dog \n\na blue cat\n"]},
        {"captions": ["a red\u2028dog\r\na blue cat"]},
        {"images": list(make_image(1, batch=2).split(1))},
    ],
    ids=["list", "spaces", "other line ends", "list of images"],
)
def test_lists_and_lines_are_the_same(model, trained, texts):
    assert same(train(model, **texts)[0], trained)


def test_encoded_captions_replace_captions(model, trained):
    texts = [TinyClip(model).encode_from_tokens_scheduled(t) for t in ("a red dog", "a blue cat")]
    assert same(train(model, captions=[""], conditioning=texts)[0], trained)
    joined = [[text for conditioning in texts for text in conditioning]]
    assert same(train(model, captions=[""], conditioning=joined)[0], trained)


@pytest.mark.parametrize("source", ["The CLIP", "conditioning"])
def test_what_is_left_out_of_captions_is_said_of_the_captions(model, caplog, source):
    class HookedClip(TinyClip):
        def encode_from_tokens_scheduled(self, tokens):
            ((states, options),) = super().encode_from_tokens_scheduled(tokens)
            return [[states, {**options, "hooks": "some"}]]

    clip, captions = HookedClip(model), ["a red dog", "a blue cat"]
    if source == "conditioning":
        SET.split_conditioning([clip.encode_from_tokens_scheduled(t) for t in captions], 2)
    else:
        SET.encode_texts(clip, captions)
    assert caplog.text.count(f"{source} adds hooks to its texts; the caption") == 2
    assert "reference" not in caplog.text


def test_one_caption_serves_all_images(model):
    one = train(model, captions=["a dog"])[0]
    assert same(train(model, captions=["a dog", "a dog"])[0], one)


class UnusedVAE(FlatVAE):
    """A VAE that must not be used: what cannot be trained on is refused before the long part."""

    def encode(self, pixels):
        raise AssertionError("called")


def speck(size):
    """Two masks, the second with a subject of a few pixels."""
    mask = torch.zeros((2, 128, 128))
    mask[0, 32:96, 16:80], mask[1, :size, :size] = 1, 1
    return mask


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"captions": ["one\ntwo\nthree"]}, "1 or 2 captions .* given 3"),
        ({"captions": ["one", "two", "three"]}, "1 or 2 captions .* given 3"),
        ({"captions": [" \n "]}, "captions is empty"),
        ({"masks": [torch.ones((1, 128, 128))]}, "mask for each of the 2 images.* given 1"),
        (
            {"masks": [torch.zeros((2, 128, 128))], "mask_marks": "subject"},
            "image 1 cannot .* an empty one",
        ),
        (
            {"masks": [speck(0)], "mask_marks": "subject"},
            "Training image 2 cannot .* for image 2 ",
        ),
        ({"masks": [speck(5)]}, "Training image 2 cannot .* got 5 x 5 .* for image 2"),
        (
            {"masks": [torch.ones((2, 128, 128))], "mask_marks": "background"},
            "image 1 cannot be used .*'background'.* an empty one",
        ),
        ({"masks": [torch.ones((2, 128, 64))]}, "mask of the image's aspect"),
        ({"images": []}, "Expected images"),
        ({"clip": None}, "needs clip"),
        ({"resolution": 100}, "multiple of 8 in 64 ... 2048 pixels, .* given 100"),
        ({"resolution": 56}, "multiple of 8 in 64 ... 2048 pixels, .* given 56"),
        ({"resolution": 2056}, r"Expected resolution in 0 \.\.\. 2048, got 2056"),
        ({"resolution": -64}, r"Expected resolution in 0 \.\.\. 2048, got -64"),
        ({"conditioning": [[[torch.zeros((1, 7, 1024)), {}]]]}, "width 768, .* gave 768, 1024"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, inputs, message):
    with pytest.raises(CORE.InputError, match=message):
        train(model, vae=UnusedVAE(), **inputs)


def test_a_clip_of_another_model_is_refused(model):
    with pytest.raises(CORE.InputError, match=r"width 768, .* gave 1024"):
        train(model, vae=UnusedVAE(), clip=TinyClip(make_model("sd21")))


@pytest.mark.parametrize("options", [{}, {"pooled_output": None}])
def test_texts_of_sdxl_without_pooled_states_are_refused(options):
    texts = [[[torch.zeros((1, 7, 2048)), options]]]
    with pytest.raises(CORE.InputError, match="pooled_output"):
        train(make_model("sdxl"), vae=UnusedVAE(), conditioning=texts)


def test_a_vae_of_another_model_is_refused_at_the_first_image(model):
    calls = []

    class WideVAE(FlatVAE):
        def encode(self, pixels):
            calls.append(1)
            return super().encode(pixels).repeat(1, 4, 1, 1)

    with pytest.raises(CORE.InputError, match="of 4 channels, the VAE gave 16"):
        train(model, vae=WideVAE())
    assert len(calls) == 1


def test_a_model_sampled_as_lcm_is_refused(model):
    lcm = model_nodes.ModelSamplingDiscrete().patch(model, "lcm", False)[0]
    with pytest.raises(CORE.DreamCacheError, match="LCM"):
        train(lcm)


class Hook:
    """ComfyUI's progress hook, which the server interrupts in."""

    def __init__(self, interrupt_after: int = 10**9) -> None:
        self.calls: list[tuple[int, int, Any]] = []
        self.interrupt_after = interrupt_after

    def __call__(self, value: int, total: int, preview: Any, **_: Any) -> None:
        self.calls.append((value, total, preview))
        if len(self.calls) == self.interrupt_after:
            comfy.model_management.interrupt_current_processing(True)
        comfy.model_management.throw_exception_if_processing_interrupted()


def test_progress_shows_pairs_then_the_loss_curve(model, monkeypatch):
    hook = Hook()
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    train(model, steps=3, reference_variants=2)
    assert [value for value, _, _ in hook.calls] == [1, 2, 3, 4, 5, 6, 7]
    assert {total for _, total, _ in hook.calls} == {7}
    kinds = [(kind, image.size) for _, _, (kind, image, _) in hook.calls]
    assert kinds == [("JPEG", (512, 256))] * 4 + [("JPEG", (512, 360))] * 3


@pytest.mark.parametrize("mirror", [True, False])
def test_references_are_mirrored_only_where_they_may_be(model, monkeypatch, mirror):
    image = torch.zeros(1, 64, 64, 3)
    image[:, :, :32, 0] = 1.0
    image[:, :, 32:, 1] = 1.0
    hook = Hook()
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    inputs = {"images": [image], "captions": ["a flag"], "steps": 6, "reference_variants": 12}
    adapters = train(model, mirror_references=mirror, **inputs)[0]
    previews = [image for _, _, (_, image, _) in hook.calls[:12]]
    assert {preview.size for preview in previews} == {(512, 256)}
    lefts = [np.asarray(preview)[:, 256:384].astype(int) for preview in previews]
    # more green than red in the left half of the reference
    mirrored = sum((left[..., 1] - left[..., 0]).sum() > 0 for left in lefts)
    assert (0 < mirrored < 12) if mirror else mirrored == 0
    assert record(adapters)["mirror_references"] is mirror


def test_an_interrupted_training_keeps_what_it_learned(model, trained, monkeypatch, caplog):
    before = kept_files()
    # two references for each of the two images, then two steps
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", Hook(interrupt_after=6))
    with pytest.raises(Interrupted):
        train(model, steps=40, reference_variants=2)
    monkeypatch.undo()
    (path,) = kept_files() - before
    loader = comfy_nodes.NODE_CLASS_MAPPINGS["DreamCacheLoadAdapters"]
    assert path.name in loader.define_schema().inputs[0].options
    assert str(path) in caplog.text
    assert "after 2 of 40 steps" in caplog.text
    kept = run("DreamCacheLoadAdapters", adapters=path.name)[0]
    assert same(kept, trained)
    assert (record(kept)["step"], record(kept)["steps"]) == (2, 40)
    further = train(model, adapters=kept)[0]
    assert same(kept, trained)
    assert not same(further, trained)
    assert json.loads(record(further)["before"])["step"] == 2


def test_an_interruption_in_the_middle_of_a_step_keeps_the_step_before(model, trained):
    before, calls = kept_files(), []
    model, unet = with_unet(model)

    def count(*_):
        calls.append(1)
        if len(calls) == 5:  # each step calls the U-Net twice
            raise Interrupted

    handle = unet.register_forward_pre_hook(count)
    try:
        with pytest.raises(Interrupted):
            train(model, steps=40, reference_variants=2)
    finally:
        handle.remove()
    (path,) = kept_files() - before
    assert same(CORE.load_adapters(path), trained)
    assert not any(m._forward_hooks for m in unet.modules())


def test_an_interruption_before_the_first_step_leaves_no_file(model, monkeypatch):
    before, told = kept_files(), []
    monkeypatch.setattr(
        pack_module("nodes.host.training.run"), "show", lambda text, _: told.append(text)
    )
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", Hook(interrupt_after=1))
    with pytest.raises(Interrupted):
        train(model)
    assert kept_files() == before
    assert told[-1].startswith("ended before the first step: nothing was learned")


@contextmanager
def nan_from(model, step):
    """The model, whose predictions from this step on are NaN."""
    model, unet = with_unet(model)
    calls = []

    def break_it(_, args):
        calls.append(1)  # two a step
        return (args[0] * torch.nan, *args[1:]) if len(calls) >= 2 * step else None

    handle = unet.register_forward_pre_hook(break_it)
    try:
        yield model
    finally:
        handle.remove()


def test_training_that_explodes_at_once_leaves_no_file(model):
    """Of the two losses the first, finite one was that of the untrained adapters."""
    before = kept_files()
    explodes = pytest.raises(CORE.StateError, match=r"step 2 is NaN.* 0\.001 is too .* No adapters")
    with nan_from(model, 2) as broken, explodes:
        train(broken, learning_rate=1e-3, steps=9)
    assert kept_files() == before


def test_after_nan_the_adapters_of_the_last_finite_loss_are_kept(model):
    before = kept_files()
    explodes = pytest.raises(CORE.StateError, match=r"step 3 is NaN.* adapters after step 1, ")
    with nan_from(model, 3) as broken, explodes:
        train(broken, steps=9)
    (path,) = kept_files() - before
    kept = CORE.load_adapters(path)
    assert same(kept, train(model, steps=1)[0])
    assert record(kept)["step"] == 1


@pytest.mark.parametrize("name", ["draw_loss_curve", "report", "TrainingRun.write_record"])
def test_what_fails_after_the_training_does_not_cost_the_adapters(
    model, trained, monkeypatch, name
):
    def fail(*_, **__):
        raise RuntimeError("broken")

    before = kept_files()
    monkeypatch.setattr(f"{NODES}.training.{name}", fail)
    with pytest.raises(RuntimeError, match="broken"):
        train(model)
    (path,) = kept_files() - before
    assert same(CORE.load_adapters(path), trained)


def test_images_that_overflow_stop_at_the_first_step_without_a_file(model):
    class BrokenVAE(FlatVAE):
        def encode(self, pixels):
            return super().encode(pixels) * torch.nan

    before = kept_files()
    with pytest.raises(CORE.StateError, match=r"step 1 is NaN.*half precision"):
        train(model, vae=BrokenVAE())
    assert kept_files() == before


def test_adapters_of_another_model_are_no_start(model):
    others = train(make_model("sdxl"), steps=1)[0]
    with pytest.raises(CORE.MismatchError, match="the adapters are for"):
        train(model, adapters=others)


def test_saved_adapters_are_listed_and_nothing_is_overwritten(trained):
    loader = comfy_nodes.NODE_CLASS_MAPPINGS["DreamCacheLoadAdapters"]
    before = set(loader.define_schema().inputs[0].options)
    for dtype in ("float32", "float16"):
        run("DreamCacheSaveAdapters", adapters=trained, filename_prefix="mine/dog", dtype=dtype)
    exact, half = sorted(set(loader.define_schema().inputs[0].options) - before)
    assert Path(exact) == Path("mine/dog_00001_.safetensors")
    assert Path(half) == Path("mine/dog_00002_.safetensors")
    loaded = run("DreamCacheLoadAdapters", adapters=exact)[0]
    assert same(loaded, trained)
    assert loaded.info == trained.info
    rounded = run("DreamCacheLoadAdapters", adapters=half)[0]
    assert not same(rounded, trained)
    assert same(rounded, trained, rtol=1e-3, atol=1e-4)
    sizes = [
        Path(folder_paths.get_full_path("dreamcache", n)).stat().st_size for n in (exact, half)
    ]
    assert sizes[0] > 1.8 * sizes[1]


@pytest.mark.parametrize(
    "prefix", ["", "a/", "../a", "a/../../b", "/tmp/a", "C:\\a", "references/a"]
)
def test_adapters_are_not_saved_elsewhere(trained, prefix):
    with pytest.raises(CORE.InputError, match="saved by name below models/dreamcache"):
        run("DreamCacheSaveAdapters", adapters=trained, filename_prefix=prefix)


def test_the_record_says_how_the_adapters_were_trained(trained):
    expected = {"steps": 2, "step": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 0}
    expected |= {
        "init": "identity",
        "caption_dropout": 0.07,
        "resolution": 64,
        "optimizer": "AdamW",
    }
    assert {name: record(trained)[name] for name in expected} == expected
    assert trained.info.prediction == "epsilon"


# --- Load Training Set


@pytest.fixture
def set_folder():
    """Six images with captions and masks below ComfyUI's input folder; one damaged, one without a mask."""
    folder = Path(folder_paths.get_input_directory()) / "toys"
    for number in range(6):
        place = folder / ("10_ball" if number % 2 else "deep/bag")
        masks = folder / "masks" / place.relative_to(folder)
        for each in (place, masks):
            each.mkdir(parents=True, exist_ok=True)
        photo, mask = (
            Image.new("RGB", (96, 80 + 8 * number), (90, 90, 100)),
            Image.new("L", (96, 80 + 8 * number)),
        )
        photo.paste((250, 40 * number, 0), (20 + number, 10, 60, 50))
        mask.paste(255, (20 + number, 10, 60, 50))
        photo.save(place / f"{number}.png")
        if number != 4:
            mask.save(masks / f"{number}.png")
        if not number % 2:
            (place / f"{number}.txt").write_text(f"a bag {number}")
    (folder / "10_ball" / "5.png").write_bytes(b"no image")
    yield folder
    shutil.rmtree(folder)


def test_a_training_set_gives_each_image_its_mask_and_caption(set_folder):
    assert {"toys", "toys/10_ball", "toys/deep"} <= set(
        run_options("DreamCacheLoadTrainingSet", "folder")
    )
    assert not any("masks" in name for name in run_options("DreamCacheLoadTrainingSet", "folder"))
    images, masks, captions, sheet = run("DreamCacheLoadTrainingSet", folder="toys")
    # 1 and 3 of '10_ball' count ten times as often
    assert captions == ["ball"] * 20 + ["a bag 0", "a bag 2", "a bag 4"]
    for image, mask in zip(images[:-1], masks[:-1], strict=True):
        assert image.shape[1:3] == mask.shape[1:]
        assert torch.equal(mask[0] > 0.5, image[0, ..., 0] > 0.9)
    assert masks[-1].min() == 1
    assert sheet.shape[-1] == 3
    assert sheet.shape[1] > 64
    told = said("DreamCacheLoadTrainingSet", folder="toys")
    assert told.startswith("23 images, 22 with a mask (the backgrounds of the others will")
    assert "; left out: 10_ball/5.png" in told
    full = set_folder / "masks" / "deep" / "bag" / "0.png"
    Image.new("L", Image.open(full).size, 255).save(full)
    told = said("DreamCacheLoadTrainingSet", folder="toys")
    assert "; 1 masks are white all over" in told


def test_a_training_set_trains_as_its_images_do(set_folder):
    images, masks, captions, _ = run("DreamCacheLoadTrainingSet", folder="toys")
    model = make_model("sd15")
    adapters, _ = train(model, images=images, masks=masks, captions=captions, steps=2)
    record = json.loads(adapters.info.extra["training"])
    assert (record["images"], record["masks"]) == (23, 22)


def test_a_cut_out_in_a_training_set_is_its_own_mask(set_folder):
    folder = set_folder / "deep" / "bag"
    for image in folder.glob("*.png"):
        cutout = Image.open(image).convert("RGBA")
        cutout.putalpha(Image.linear_gradient("L").resize(cutout.size))
        cutout.save(image)
    _, masks, _, _ = run("DreamCacheLoadTrainingSet", folder="toys/deep")
    assert all(0 < float(mask.mean()) < 1 for mask in masks)


def test_training_shows_what_it_draws_and_is_not_touched_by_it(model, monkeypatch):
    loop, hook = pack_module("nodes.host.training.loop"), Hook()
    plain, _ = train(model, steps=4)
    monkeypatch.setattr(loop, "SAMPLES_AFTER", (0, 2))
    monkeypatch.setattr(loop, "SAMPLE_EVERY", 3)
    shown = []
    show = pack_module("nodes.host.training.run").TrainingRun.show_sample
    monkeypatch.setattr(
        pack_module("nodes.host.training.run").TrainingRun,
        "show_sample",
        lambda self, latents: (shown.append((len(self.losses), latents)), show(self, latents)),
    )
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    sampled, _ = train(model, steps=4)
    assert same(plain, sampled)
    assert [step for step, _ in shown] == [0, 2, 3]
    for _, latents in shown:
        assert [each.shape for each in latents] == [(1, 4, 8, 8)] * 3
        assert all(each.isfinite().all() for each in latents)
    first, last = shown[0][1], shown[-1][1]
    assert torch.equal(first[1], last[1])  # without the reference: the same noise, the plain model
    assert_close(first[2], first[1], 1e-4)  # identity starts as the plain model
    assert not torch.equal(last[2], last[1])
    above_curve = [image for _, _, image in hook.calls if image is not None][-1][1]
    assert above_curve.size[1] > 360


def test_training_says_what_it_does_and_that_masks_are_missing(monkeypatch):
    told = []
    package = __import__("sys").modules[NODES + ".host.training.run"]
    monkeypatch.setattr(package, "show", lambda text, node: told.append(text))
    monkeypatch.setattr(package.time, "monotonic", iter(range(10_000)).__next__)
    model = make_model("sd15")
    train(model, init="fitted", steps=2)
    assert [text.split(";")[0].split(",")[0] for text in told][-2:] == [
        "step 1 of 2",
        "step 2 of 2",
    ]
    assert any(text.startswith("making references: 1 of") for text in told)
    assert any(text.startswith("fitting to the model: pass 128 of 128") for text in told)
    assert all("2 of 2 images have no mask: their backgrounds will come" in text for text in told)


def test_a_changed_file_runs_the_training_set_again(set_folder):
    node = comfy_nodes.NODE_CLASS_MAPPINGS["DreamCacheLoadTrainingSet"]
    before = node.fingerprint_inputs(folder="toys", caption="")
    assert node.fingerprint_inputs(folder="toys", caption="") == before
    (set_folder / "deep" / "bag" / "0.txt").write_text("another caption")
    assert node.fingerprint_inputs(folder="toys", caption="") != before


@pytest.mark.parametrize("name", ["", ".", "..", "../input", "none", None])
def test_a_training_set_elsewhere_is_refused(name):
    with pytest.raises(CORE.InputError, match="There is no folder"):
        run("DreamCacheLoadTrainingSet", folder=name)


def test_a_training_set_without_captions_says_what_to_do(set_folder):
    for text in (set_folder / "deep" / "bag").glob("*.txt"):
        text.unlink()
    with pytest.raises(CORE.InputError, match="has no caption; add"):
        run("DreamCacheLoadTrainingSet", folder="toys/deep")
    *_, captions, _ = run("DreamCacheLoadTrainingSet", folder="toys/deep", caption="a bag")
    assert captions == ["a bag"] * 3
