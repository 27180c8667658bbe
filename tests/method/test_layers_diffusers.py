"""METHOD.md's table of cached layers, on the real configurations; the meta device takes no memory."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from golden import load_case
from tiny_diffusers import golden_unet, random_unet, sdxl_unet

from dreamcache_core import AdapterInfo, AdapterSet, MismatchError, UnsupportedModelError
from dreamcache_core.method.backends import attention_sites, layout_of, select_sites

pytestmark = pytest.mark.diffusers

CONFIGURATIONS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SD_TABLE = [
    ("middle_block.1", "mid_block.attentions.0", 1280),
    ("output_blocks.4.1", "up_blocks.1.attentions.1", 1280),
    ("output_blocks.6.1", "up_blocks.2.attentions.0", 640),
    ("output_blocks.8.1", "up_blocks.2.attentions.2", 640),
    ("output_blocks.10.1", "up_blocks.3.attentions.1", 320),
]
SDXL_TABLE = [
    ("middle_block.1", "mid_block.attentions.0", 1280),
    ("output_blocks.1.1", "up_blocks.0.attentions.1", 1280),
    ("output_blocks.3.1", "up_blocks.1.attentions.0", 640),
    ("output_blocks.5.1", "up_blocks.1.attentions.2", 640),
]
TABLES = {"sd15": SD_TABLE, "sd21": SD_TABLE, "sdxl": SDXL_TABLE}
# number of attention modules: encoder, middle, decoder
COUNTS = {"sd15": (6, 1, 9), "sd21": (6, 1, 9), "sdxl": (4, 1, 6)}


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def model(request):
    with torch.device("meta"):
        return request.param, UNet2DConditionModel(**CONFIGURATIONS[request.param])


def test_cached_layers_equal_the_table(model):
    family, unet = model
    sites = select_sites(unet).values()
    assert [(s.name, s.native_name, s.channels) for s in sites] == TABLES[family]


def test_family_and_context_width_are_read_from_the_model(model):
    family, unet = model
    layout = layout_of(unet)
    assert layout.family == family
    assert layout.context_width == CONFIGURATIONS[family]["cross_attention_dim"]
    assert layout.layers == tuple(name for name, _, _ in TABLES[family])


def test_native_names_lead_to_the_modules(model):
    _, unet = model
    for site in attention_sites(unet):
        assert unet.get_submodule(site.native_name) is site.module


def test_layer_names_are_one_to_one_and_complete(model):
    family, unet = model
    sites = attention_sites(unet)
    transformers = {
        name for name, m in unet.named_modules() if type(m).__name__ == "Transformer2DModel"
    }
    assert {site.native_name for site in sites} == transformers
    assert len({site.name for site in sites}) == len(sites) == sum(COUNTS[family])
    parts = [site.part for site in sites]
    assert tuple(parts.count(p) for p in ("encoder", "middle", "decoder")) == COUNTS[family]


def test_adapter_sits_on_the_first_block_with_the_heads_of_its_self_attention(model):
    family, unet = model
    for site in select_sites(unet).values():
        assert site.block is site.module.transformer_blocks[0]
        assert site.heads == (8 if family == "sd15" else site.channels // 64)


def test_adapter_parameters_equal_the_table(model):
    family, unet = model
    with torch.device("meta"):
        adapters = AdapterSet(AdapterInfo(layout_of(unet)))
    if family == "sdxl":
        assert adapters.num_parameters == pytest.approx(24.6e6, abs=0.05e6)
        assert len(adapters.state_dict()) == 36
    else:
        assert adapters.num_parameters == 25_207_040
        assert len(adapters.state_dict()) == 45


@pytest.mark.parametrize("name", ["sd21_tiny", "sd15_tiny"])
def test_names_and_widths_equal_those_of_the_ldm_checkpoint(name):
    case = load_case(name)
    pattern = r"(.+)\.transformer_blocks\.0\.norm1\.weight"
    ldm = {
        match[1]: len(weight)
        for key, weight in case.unet_weights.items()
        if (match := re.fullmatch(pattern, key))
    }
    sites = {site.name: site for site in attention_sites(golden_unet(case))}
    assert {name: site.channels for name, site in sites.items()} == ldm
    for name, site in sites.items():
        weight = case.unet_weights[f"{name}.transformer_blocks.0.attn1.to_q.weight"]
        assert torch.equal(site.block.attn1.to_q.weight, weight), name


def test_execution_order_is_that_of_a_forward_pass():
    unet, order = sdxl_unet(), []
    sites = attention_sites(unet)
    for site in sites:
        site.module.register_forward_pre_hook(lambda *_, name=site.name: order.append(name))
    added = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 2048), added_cond_kwargs=added)
    assert order == [site.name for site in sites]


def test_model_without_a_middle_block_has_decoder_layers_only():
    unet = random_unet(
        48,
        mid_block_type=None,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    assert [site.name for site in attention_sites(unet)] == [
        "input_blocks.1.1",
        "output_blocks.2.1",
        "output_blocks.3.1",
    ]
    assert layout_of(unet).layers == ("output_blocks.3.1",)


def test_layers_may_be_chosen_and_come_in_execution_order():
    unet = random_unet(48)
    chosen = select_sites(unet, ["output_blocks.3.1", "input_blocks.1.1"])
    assert list(chosen) == ["input_blocks.1.1", "output_blocks.3.1"]
    assert layout_of(unet, ["output_blocks.11.1"]).channels == {"output_blocks.11.1": 32}


@pytest.mark.parametrize("layers", [["output_blocks.0.1"], ["up_blocks.1.attentions.1"]])
def test_layer_that_the_model_lacks_is_named_with_those_that_it_has(layers):
    with pytest.raises(MismatchError, match=rf"no attention layer {layers[0]}.*middle_block\.1"):
        select_sites(random_unet(48), layers)


def test_empty_layer_list_is_refused():
    with pytest.raises(MismatchError, match=r"at least one cached layer, given none\. .*middle"):
        layout_of(random_unet(48), [])


def test_unet_without_text_is_refused():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(UnsupportedModelError, match="UNet2DModel has no attention modules"):
        layout_of(unet)
