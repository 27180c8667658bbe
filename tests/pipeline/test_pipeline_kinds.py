"""Which diffusers pipelines are taken: plain text-to-image ones, with any VAE of Stable Diffusion; others are refused."""

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from tiny_diffusers import random_adapters
from tiny_pipeline import tiny_pipeline, tiny_sdxl_pipeline, wrap

from dreamcache_core import DreamCachePipeline, ReferenceUse, UnsupportedModelError

pytestmark = pytest.mark.diffusers


class Flux:
    transformer = tokenizer = vae = scheduler = object()


def image():
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))


def with_controlnet(base):
    parts = {**base.components, "controlnet": ControlNetModel.from_unet(base.unet)}
    return StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)


OTHER_PIPELINES = {
    "no Stable Diffusion": lambda _: Flux(),
    "image to image": StableDiffusionImg2ImgPipeline.from_pipe,
    "inpainting": StableDiffusionInpaintPipeline.from_pipe,
    "perturbed attention": StableDiffusionPAGPipeline.from_pipe,
    "ControlNet": with_controlnet,
}


@pytest.mark.parametrize("kind", OTHER_PIPELINES)
def test_a_pipeline_that_does_something_else_is_refused(tmp_path, kind):
    other = OTHER_PIPELINES[kind](tiny_pipeline(tmp_path))
    message = f"given a {type(other).__name__}.*StableDiffusionPipeline.from_pipe"
    with pytest.raises(UnsupportedModelError, match=message):
        DreamCachePipeline(other)


def test_the_plain_pipeline_of_the_parts_of_another_is_taken(tmp_path):
    other = StableDiffusionImg2ImgPipeline.from_pipe(tiny_pipeline(tmp_path))
    assert wrap(StableDiffusionPipeline.from_pipe(other)).encode_reference(image())


def test_a_pipeline_of_sdxl_that_does_something_else_is_refused(tmp_path):
    other = StableDiffusionXLImg2ImgPipeline(**tiny_sdxl_pipeline(tmp_path).components)
    with pytest.raises(UnsupportedModelError, match="given a StableDiffusionXLImg2ImgPipeline"):
        DreamCachePipeline(other)


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 9},
        {"class_embed_type": "projection"},
        {"num_class_embeds": 10},
        {"encoder_hid_dim_type": "text_proj"},
        {"time_cond_proj_dim": 256},
        {"addition_embed_type": "image"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_unet_that_takes_more_than_latent_time_and_text_is_refused(tmp_path, changes):
    base = tiny_pipeline(tmp_path)
    base.unet.register_to_config(**changes)
    with pytest.raises(UnsupportedModelError, match="takes other inputs"):
        DreamCachePipeline(base)


def load_ip_adapter(unet):
    """Give a U-Net an IP-Adapter of random weights, as ``load_ip_adapter`` does from a file."""
    width, weights = unet.config.cross_attention_dim, {}
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(names):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * number + 1}.{part}.weight"] = torch.randn(channels, width)
    projection = {
        "proj.weight": torch.randn(4 * width, 16),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights(
        [{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False
    )


def test_an_ip_adapter_is_refused_whenever_it_was_loaded_and_taken_when_unloaded(tmp_path):
    base = tiny_pipeline(tmp_path)
    pipe = wrap(base)
    use = ReferenceUse(pipe.encode_reference(image()), random_adapters(pipe.layout))
    load_ip_adapter(base.unet)
    with pytest.raises(UnsupportedModelError, match=r"unload_ip_adapter\(\)"):
        wrap(base)
    with pytest.raises(UnsupportedModelError, match=r"unload_ip_adapter\(\)"):
        pipe.encode_reference(image())
    with pytest.raises(UnsupportedModelError, match=r"unload_ip_adapter\(\)"):
        pipe("a cat", use, num_inference_steps=1)
    base.unload_ip_adapter()
    assert wrap(base).encode_reference(image())


def test_a_pipeline_without_one_of_its_models_is_refused(tmp_path):
    base = tiny_sdxl_pipeline(tmp_path)
    base.text_encoder_2 = None
    with pytest.raises(UnsupportedModelError, match="lacks text_encoder_2"):
        DreamCachePipeline(base)


def test_a_scheduler_without_noise_levels_is_refused_whenever_it_was_put_in(tmp_path):
    base = tiny_pipeline(tmp_path)
    pipe, base.scheduler = wrap(base), FlowMatchEulerDiscreteScheduler()
    for refused in (lambda: wrap(base), lambda: pipe.encode_reference(image())):
        with pytest.raises(UnsupportedModelError, match="alphas_cumprod"):
            refused()


def test_a_scheduler_whose_steps_take_more_is_refused(tmp_path):
    from diffusers import RePaintScheduler

    base = tiny_pipeline(tmp_path)
    pipe, base.scheduler = wrap(base), RePaintScheduler()
    with pytest.raises(
        UnsupportedModelError, match=r"RePaintScheduler takes .*original_image, mask"
    ):
        pipe("a dog", [], num_inference_steps=1)


def test_a_tiny_vae_encodes_and_decodes_by_itself(tmp_path):
    base = tiny_pipeline(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        base.vae = AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
        ).eval()
    pipe = wrap(base)
    pixels = image().permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        assert torch.equal(pipe.codec.encode(image()), base.vae.encode(pixels).latents)
    use = ReferenceUse(pipe.encode_reference(image()), random_adapters(pipe.layout, 5))
    drawn = pipe("a cat", use, num_inference_steps=1, output_type="pt")
    assert drawn.shape == (1, 3, 64, 64)
