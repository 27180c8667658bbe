"""The demo model in ComfyUI: what diffusers makes of the same files, with stock nodes and with ours."""

import os
from pathlib import Path

import comfy.model_detection
import comfy.supported_models
import comfy.utils
import latent_preview
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training_nodes import NODE as TRAIN
from tiny import CORE, MODEL, pack_module, run

import nodes as comfy_nodes

FOLDER = Path(os.environ.get("EXCHANGE_FOLDER", "absent"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the folder comes from tests/nodes")

DEMO = pack_module("nodes.host.demo")
FILES = pack_module("dreamcache_core.demo.files")
WORLD_SHAPES = pack_module("dreamcache_core.demo.world.shapes").SHAPES
PROMPT = "a striped mug on the grass, left"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def files():
    return FILES.require_demo_files(FOLDER / "demo")


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "demo.safetensors")


@pytest.fixture(scope="module")
def loaded(files):
    """MODEL, CLIP and VAE, as the node loads them."""
    with torch.inference_mode():
        return DEMO.load_unet(files), DEMO.load_clip(files), DEMO.load_vae(files)


@pytest.fixture(scope="module")
def adapters(files):
    return CORE.load_adapters(files.adapters)


def stock(name, **inputs):
    """Run one of ComfyUI's own nodes."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS[name]
    return getattr(node(), node.FUNCTION)(**inputs)[0]


def difference(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def test_the_unet_predicts_what_it_predicts_in_diffusers(loaded, expected):
    unet = loaded[0].model.diffusion_model
    text = expected["states"].expand(2, -1, -1)
    prediction = unet(expected["x"], expected["times"], context=text)
    assert difference(prediction, expected["plain"]) < TOLERANCE


def test_levels_may_be_one_and_a_half_times_as_wide(files):
    widths = [64, 96, 96, 96]
    settings = files.config("unet")
    settings |= {"block_out_channels": widths, "attention_head_dim": [w // 32 for w in widths]}
    config = DEMO.DemoConfig(settings, "v_prediction", files.preview())
    config.set_inference_dtype(torch.float32, None)
    unet = config.get_model({}, "", device=torch.device("cpu")).diffusion_model
    ends = [unet.input_blocks[index][0] for index in (2, 5, 8, 11)]
    assert [block.out_layers[-1].out_channels for block in ends] == widths


def test_the_prediction_is_taken_as_v_at_diffusers_noise_levels(loaded, expected):
    model, x, v = loaded[0].model, expected["x"], expected["plain"]
    abar = expected["alphas_cumprod"][expected["times"].long()][:, None, None, None]
    sigmas = model.model_sampling.sigma(expected["times"])
    assert difference(sigmas, ((1 - abar) / abar).sqrt().flatten()) < TOLERANCE
    text = expected["states"].expand(2, -1, -1)
    denoised = model.apply_model(x / abar.sqrt(), sigmas, c_crossattn=text)
    assert difference(denoised, abar.sqrt() * x - (1 - abar).sqrt() * v) < TOLERANCE


def test_a_reference_acts_as_it_does_in_diffusers(loaded, adapters, expected):
    unet, text = loaded[0].model.diffusion_model, expected["states"]
    cache = CORE.capture_reference(unet, expected["reference"], 1, text)
    with CORE.inject(unet, CORE.ReferenceUse(cache, adapters)):
        guided = unet(expected["x"], expected["times"], context=text.expand(2, -1, -1))
    assert difference(guided, expected["guided"]) < TOLERANCE
    assert difference(guided, expected["plain"]) > 1e-2


def test_a_prompt_has_the_tokens_and_states_of_transformers(loaded, expected):
    clip = loaded[1]
    (tokens,) = clip.tokenize(PROMPT)["l"]
    assert [token for token, _ in tokens] == expected["ids"][0].tolist()
    states, options = stock("CLIPTextEncode", clip=clip, text=PROMPT)[0]
    assert difference(states, expected["states"]) < TOLERANCE
    assert bool(options["pooled_output"].isfinite().all())


def test_a_prompt_longer_than_the_model_takes_goes_on_in_another_round(loaded):
    (states, _), *_ = stock("CLIPTextEncode", clip=loaded[1], text=", ".join([PROMPT] * 5))
    assert states.shape[1] % 32 == 0
    assert states.shape[1] > 32
    assert bool(states.isfinite().all())


def test_the_vae_encodes_and_decodes_as_in_diffusers(loaded, expected):
    vae = loaded[2]
    pixels = (expected["pixels"].movedim(1, -1) + 1) / 2
    assert difference(vae.encode(pixels), expected["encoded"]) < TOLERANCE
    decoded = stock("VAEDecode", vae=vae, samples={"samples": expected["x"]})
    image = ((expected["decoded"] + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert difference(decoded, image) < TOLERANCE


def test_previews_have_the_images_colours():
    shipped = FILES.require_demo_files()
    image = run("DreamCacheDemoReference", shape="mug", seed=3)[0]
    with torch.inference_mode():
        model, vae = DEMO.load_unet(shipped).model, DEMO.load_vae(shipped)
        latent = model.process_latent_in(vae.encode(image))
    known = model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(
        known.latent_rgb_factors, known.latent_rgb_factors_bias
    )
    preview = np.asarray(previewer.decode_latent_to_preview(latent)).copy()
    small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8).movedim(1, -1)[0]
    assert float((torch.from_numpy(preview) / 255.0 - small).abs().mean()) < 0.06


def test_it_runs_from_a_drawn_reference_to_an_image(loaded, adapters):
    model, clip, vae = loaded
    assert MODEL.model_layout(model).family == "custom-128"
    assert MODEL.default_side_px(model) == 128
    image = run("DreamCacheDemoReference", shape="mug", seed=3)[0]
    reference = run("DreamCacheEncode", model=model, clip=clip, vae=vae, image=image)[0]
    applied = run("DreamCacheApply", model=model, adapters=adapters, reference=reference)[0]
    texts = {
        name: stock("CLIPTextEncode", clip=clip, text=text)
        for name, text in (("positive", PROMPT), ("negative", ""))
    }
    settings = {
        "seed": 5,
        "steps": 2,
        "cfg": 3.0,
        "sampler_name": "dpmpp_2m",
        "scheduler": "normal",
    }
    latent = stock("EmptyLatentImage", width=128, height=128, batch_size=1)
    images = [
        stock(
            "VAEDecode",
            vae=vae,
            samples=stock("KSampler", model=used, latent_image=latent, **texts, **settings),
        )
        for used in (model, applied, model)
    ]
    assert images[0].shape == (1, 128, 128, 3)
    assert difference(images[0], images[1]) > 0.01
    assert torch.equal(images[0], images[2])


def test_its_adapters_are_trained_on_here(loaded, adapters):
    model, clip, vae = loaded
    image = run("DreamCacheDemoReference", shape="fish", seed=1)[0]
    inputs = {"model": model, "vae": vae, "clip": clip, "adapters": adapters, "resolution": 128}
    given = {name: [value] for name, value in inputs.items()}
    settings = {"steps": 2, "batch_size": 1, "learning_rate": 1e-3, "seed": 0, "init": "identity"}
    given.update({name: [value] for name, value in settings.items()})
    trained = TRAIN.execute(images=[image], captions=["a fish in the sea"], **given).result[0]
    assert trained.info.prediction == "v_prediction"
    assert trained.info.layout == adapters.info.layout


def test_adapters_fitted_here_are_those_fitted_in_diffusers(loaded):
    model, clip, _ = loaded
    fitted = run("DreamCacheModelAdapters", model=model, clip=clip, seed=0, size=64)[0]
    expected = CORE.load_adapters(FOLDER / "fitted.safetensors")
    assert fitted.info.prediction == expected.info.prediction
    for name, weight in expected.state_dict().items():
        error = (fitted.state_dict()[name] - weight).norm()
        assert error <= TOLERANCE * weight.norm(), name


def test_nobody_elses_checkpoints_are_taken_for_it(files):
    known = comfy.supported_models.models
    assert not any(issubclass(config, DEMO.DemoConfig) for config in known)
    weights = comfy.utils.load_torch_file(str(files.weights("unet")))
    assert comfy.model_detection.model_config_from_diffusers_unet(weights) is None


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CORE.FileFormatError, match=r"lacks model/unet/config\.json.*download"):
        FILES.require_demo_files(tmp_path)


def test_the_reference_shows_the_subject_of_its_seed():
    one, same, other = (
        run("DreamCacheDemoReference", shape="star", seed=seed)[0] for seed in (7, 7, 8)
    )
    assert one.shape == (1, 128, 128, 3)
    assert bool((one[0, 0, 0] > 0.9).all()), "a reference stands on white"
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(CORE.InputError, match="shape must be one of ball"):
        run("DreamCacheDemoReference", shape="dragon", seed=0)


def test_views_are_images_of_the_same_subject_in_other_poses():
    one = run("DreamCacheDemoReference", shape="star", seed=7)
    images, masks = run("DreamCacheDemoReference", shape="star", seed=7, views=3)[:2]
    assert images.shape == (3, 128, 128, 3)
    assert masks.shape == (3, 128, 128)
    assert torch.equal(images[:1], one[0])
    assert not torch.equal(images[0], images[1])
    colours = [image[mask > 0.5].mean(dim=0) for image, mask in zip(images, masks, strict=True)]
    assert difference(colours[0], colours[1]) < 0.1


def test_photos_are_a_training_set_of_the_world(loaded, adapters):
    images, masks, captions = run("DreamCacheDemoPhotos", shape="any", count=4, seed=3)[:3]
    fewer = run("DreamCacheDemoPhotos", shape="any", count=2, seed=3)
    assert all(map(torch.equal, fewer[0], images[:2]))
    assert [image.shape for image in images] == [(1, 128, 128, 3)] * 4
    assert all(0.01 < mask.mean() < 0.5 for mask in masks)
    shapes = [
        next(word for word in WORLD_SHAPES if word in text.replace(",", "").split())
        for text in captions
    ]
    assert len(set(shapes)) > 1
    model, clip, vae = loaded
    inputs = {"model": model, "vae": vae, "clip": clip, "adapters": adapters, "resolution": 128}
    settings = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "seed": 0, "init": "identity"}
    given = {name: [value] for name, value in (inputs | settings).items()}
    trained = TRAIN.execute(images=images, masks=masks, captions=captions, **given).result[0]
    assert trained.info.layout == adapters.info.layout
    mugs = run("DreamCacheDemoPhotos", shape="mug", count=3, seed=3)[2]
    assert all("mug" in caption for caption in mugs)
    with pytest.raises(CORE.InputError, match="shape must be one of any, ball"):
        run("DreamCacheDemoPhotos", shape="crown", count=1, seed=0)
