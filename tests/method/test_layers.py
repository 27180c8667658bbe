"""Which layers are cached, and which models belong together. Real U-Nets: test_layers_diffusers."""

import pytest
from torch import nn

from dreamcache_core.errors import MismatchError
from dreamcache_core.method.layers import (
    AttentionSite,
    Layout,
    Part,
    default_layers,
    family_of,
    require_same_layout,
)

LAYOUT = Layout(768, {"middle_block.1": 12, "output_blocks.4.1": 8})


def site(name: str, part: Part) -> AttentionSite:
    return AttentionSite(name, name, part, nn.Identity())


@pytest.mark.parametrize(
    ("width", "family"), [(768, "sd15"), (1024, "sd21"), (2048, "sdxl"), (512, "custom-512")]
)
def test_family_follows_the_width_of_the_text_states(width: int, family: str):
    assert family_of(width) == family
    assert Layout(width, {}).family == family


def test_rule_takes_the_middle_and_decoder_layers_of_even_number():
    sites = [
        site("input_blocks.1.1", "encoder"),
        site("input_blocks.2.1", "encoder"),
        site("middle_block.1", "middle"),
        site("output_blocks.0.1", "decoder"),
        site("output_blocks.1.1", "decoder"),
        site("output_blocks.2.1", "decoder"),
    ]
    assert default_layers(sites) == ("middle_block.1", "output_blocks.1.1")


def test_rule_counts_encoder_layers_so_that_the_decoder_parity_shifts():
    sites = [
        site("input_blocks.1.1", "encoder"),
        site("middle_block.1", "middle"),
        site("output_blocks.0.1", "decoder"),
        site("output_blocks.1.1", "decoder"),
    ]
    assert default_layers(sites) == ("middle_block.1", "output_blocks.0.1")


def test_middle_layer_of_odd_number_is_cached_too():
    sites = [site("input_blocks.1.1", "encoder"), site("middle_block.1", "middle")]
    assert default_layers(sites) == ("middle_block.1",)


def test_model_without_attention_has_no_cached_layers():
    assert default_layers([]) == ()


def test_layers_keep_their_order():
    assert LAYOUT.layers == ("middle_block.1", "output_blocks.4.1")


@pytest.mark.parametrize(
    ("width", "name"),
    [
        (768, "Stable Diffusion 1.5"),
        (1024, "Stable Diffusion 2.1"),
        (2048, "SDXL"),
        (128, "a custom model (text width 128)"),
    ],
)
def test_description_names_the_family(width: int, name: str):
    assert Layout(width, LAYOUT.channels).describe() == name


def test_equal_layouts_belong_together_in_any_order_of_layers():
    turned = Layout(768, dict(reversed(list(LAYOUT.channels.items()))))
    require_same_layout(LAYOUT, "The reference is", turned, "the adapters are for")


@pytest.mark.parametrize(
    "other",
    [
        Layout(1024, LAYOUT.channels),
        Layout(768, {"middle_block.1": 12}),
        Layout(768, {"middle_block.1": 12, "output_blocks.6.1": 8}),
        Layout(768, {"middle_block.1": 12, "output_blocks.4.1": 4}),
    ],
    ids=["text width", "fewer layers", "another layer", "another width"],
)
def test_mismatch_names_both_sides(other: Layout):
    with pytest.raises(MismatchError) as error:
        require_same_layout(LAYOUT, "This model is", other, "the adapters are for")
    message = str(error.value)
    assert message.startswith(
        f"This model is Stable Diffusion 1.5, the adapters are for {other.describe()}"
    )
    assert ("another structure" in message) == (other.context_width == 768)
    assert "block" not in message
