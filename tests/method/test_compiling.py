"""torch.compile: one graph without a break with references in it, and none anew when they change."""

from dataclasses import replace

import accelerate
import pytest
import torch
from tiny_diffusers import random_adapters, random_unet
from tiny_pipeline import tiny_pipeline, wrap
from torch._dynamo.utils import counters

from dreamcache_core import ReferenceUse, StateError, capture_reference, inject, prepare_for_compile
from dreamcache_core.method.backends import layout_of

pytestmark = pytest.mark.diffusers

ROWS = [False, True, True]
SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}


def small_unet():
    """Few enough blocks to be traced in a second."""
    return random_unet(48, **SMALL).requires_grad_(False)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(unet, batch=3):
    x, text = randn(batch, 4, 8, 24, seed=1), randn(batch, 5, 48, seed=2)
    return unet(x, 601, text).sample


def encode(unet, seed, size=8):
    return capture_reference(unet, randn(1, 4, size, size, seed=seed), 1, randn(1, 5, 48, seed=9))


EAGER = {"backend": "eager", "fullgraph": True}


def compile_parts(*kinds):
    def compile_(unet):
        for part in unet.modules():
            if type(part).__name__ in kinds:
                part.compile(**EAGER)

    return compile_


def replace_children(unet):
    unet.mid_block = torch.compile(unet.mid_block, **EAGER)
    for index, block in enumerate(unet.up_blocks):
        unet.up_blocks[index] = torch.compile(block, **EAGER)


def replace_forward(unet):
    unet.forward = torch.compile(unet.forward, **EAGER)


WAYS_TO_COMPILE = {
    "in place": lambda unet: unet.compile(**EAGER),
    "repeated blocks": lambda unet: unet.compile_repeated_blocks(**EAGER),
    "attention modules": compile_parts("Transformer2DModel"),
    "attention alone": compile_parts("Attention"),
    "replaced children": replace_children,
    "replaced forward": replace_forward,
}


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def expected():
    """Uncompiled results with two references, and without."""
    unet = small_unet()
    adapters = random_adapters(layout_of(unet))
    uses = [ReferenceUse(encode(unet, seed), adapters.fuse()) for seed in (8, 18)]
    outputs = []
    with torch.no_grad():
        for use in uses:
            with inject(unet, use, rows=ROWS):
                outputs.append(call(unet))
        return uses, outputs, call(unet)


@pytest.fixture(params=["wrapped", "in place"])
def compiled(request):
    """A compiled U-Net that refuses graph breaks."""
    unet = small_unet()
    prepare_for_compile(unet)
    if request.param == "wrapped":
        return torch.compile(unet, backend="eager", fullgraph=True)
    unet.compile(backend="eager", fullgraph=True)
    return unet


@torch.no_grad()
def test_references_are_compiled_in_one_graph_and_swapped_without_another(compiled, expected):
    (first, second), outputs, plain = expected
    assert torch.equal(call(compiled), plain)
    assert num_graphs() == 1
    for use, output in zip((first, second), outputs, strict=True):
        with inject(compiled, use, rows=ROWS):
            assert torch.equal(call(compiled), output)
            assert torch.equal(call(compiled), output)
    assert num_graphs() == 2
    assert torch.equal(call(compiled), plain)
    assert num_graphs() == 2


@torch.no_grad()
def test_other_adapters_of_the_same_shapes_need_no_compiling(compiled, expected):
    (use, _), (output, _), _ = expected
    layout = use.adapters.info.layout
    with inject(compiled, use, rows=ROWS):
        call(compiled)
    graphs = num_graphs()
    other = ReferenceUse(use.reference, random_adapters(layout, seed=77).fuse())
    with inject(compiled, other, rows=ROWS):
        changed = call(compiled)
    assert num_graphs() == graphs
    unet = small_unet()
    with inject(unet, other, rows=ROWS):
        assert torch.equal(changed, call(unet))
    assert not torch.equal(changed, output)


@torch.no_grad()
def test_other_scales_need_no_compiling(compiled, expected):
    (use, _), _, _ = expected
    for scale in (1.0, 0.5, 1.25):
        with inject(compiled, replace(use, scale=scale), rows=ROWS):
            call(compiled)
    assert num_graphs() == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {"scale": 0.5},
        {"mask": torch.ones(8, 24).tril()},
        {"scale": 0.0},
    ],
    ids=["scale", "region", "off"],
)
def test_other_settings_give_what_they_give_uncompiled(compiled, expected, change):
    (use, _), _, _ = expected
    with inject(compiled, use, rows=ROWS):
        call(compiled)
    changed = replace(use, **change)
    unet = small_unet()
    with inject(unet, changed, rows=ROWS):
        output = call(unet)
    with inject(compiled, changed, rows=ROWS):
        assert torch.equal(call(compiled), output)


@torch.no_grad()
def test_a_larger_reference_gives_what_it_gives_uncompiled(compiled, expected):
    (use, _), _, _ = expected
    unet = small_unet()
    larger = ReferenceUse(encode(unet, 8, size=16), use.adapters)
    with inject(unet, larger, rows=ROWS):
        output = call(unet)
    for each in (use, larger):
        with inject(compiled, each, rows=ROWS):
            result = call(compiled)
    assert torch.equal(result, output)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS_TO_COMPILE)
def test_a_reference_is_drawn_with_however_a_prepared_unet_is_compiled(expected, way):
    (use, _), (output, _), plain = expected
    unet = small_unet()
    prepare_for_compile(unet)
    WAYS_TO_COMPILE[way](unet)
    for _ in range(2):
        assert torch.equal(call(unet), plain)
        with inject(unet, use, rows=ROWS):
            assert torch.equal(call(unet), output)


@torch.no_grad()
@pytest.mark.parametrize("way", ["in place", "repeated blocks"])
def test_a_plain_unet_that_was_compiled_before_lends_no_graph(expected, way):
    (use, _), (output, _), plain = expected
    other, unet = small_unet(), small_unet()
    WAYS_TO_COMPILE[way](other)
    assert torch.equal(call(other), plain)
    prepare_for_compile(unet)
    WAYS_TO_COMPILE[way](unet)
    with inject(unet, use, rows=ROWS):
        assert torch.equal(call(unet), output)
        assert torch.equal(call(other), plain)
    assert torch.equal(call(unet), plain)


@torch.no_grad()
def test_a_reference_is_drawn_with_in_a_compiled_function_that_calls_the_unet(expected):
    (use, _), (output, _), plain = expected
    unet = small_unet()
    step = torch.compile(lambda: call(unet), backend="eager")
    for _ in range(2):
        assert torch.equal(step(), plain)
        with inject(unet, use, rows=ROWS):
            assert torch.equal(step(), output)


@torch.no_grad()
def test_repeated_blocks_of_sixteen_stay_within_torchs_number_of_graphs():
    unet = random_unet(48).requires_grad_(False)
    use = ReferenceUse(encode(unet, 8), random_adapters(layout_of(unet)).fuse())
    with inject(unet, use, rows=ROWS):
        output = call(unet)
    prepare_for_compile(unet)
    unet.compile_repeated_blocks(**EAGER)
    call(unet)
    with inject(unet, use, rows=ROWS):
        assert torch.equal(call(unet), output)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS_TO_COMPILE)
def test_compiled_parts_are_seen_where_hooks_come_too_late(expected, way):
    (use, _), _, _ = expected
    unet = small_unet()
    WAYS_TO_COMPILE[way](unet)
    call(unet)
    with pytest.raises(StateError, match="Call prepare_for_compile"), inject(unet, use):
        pass
    with pytest.raises(StateError, match="Call prepare_for_compile first"):
        prepare_for_compile(unet)
    features = encode(unet, 8).features
    assert all(torch.equal(features[name], use.reference.features[name]) for name in features)


def test_the_classes_of_a_unet_are_its_own_again_after_inject(expected):
    (use, _), _, _ = expected
    unet = small_unet()
    before, shown = [type(part) for part in unet.modules()], repr(unet)
    with inject(unet, use):
        assert [type(part) for part in unet.modules()] != before
        assert repr(unet) == shown
    assert [type(part) for part in unet.modules()] == before


def test_preparing_comes_before_compiling(compiled):
    with pytest.raises(StateError, match="Call prepare_for_compile first"):
        prepare_for_compile(compiled)


def test_adapters_of_other_layers_than_prepared_are_refused(expected):
    (use, _), _, _ = expected
    unet = small_unet()
    prepare_for_compile(unet, ["middle_block.1"])
    with (
        pytest.raises(StateError, match=r"these adapters need output_blocks"),
        inject(unet, use),
    ):
        pass


def test_preparing_again_leaves_the_new_hooks_only(expected):
    (use, _), (output, _), _ = expected
    unet = small_unet()
    for _ in range(2):
        prepare_for_compile(unet)
    with torch.no_grad(), inject(unet, use, rows=ROWS):
        assert torch.equal(call(unet), output)


def store_in_fp8(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offload(unet):
    accelerate.cpu_offload(unet, torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("change", [store_in_fp8, offload])
def test_a_compiled_unet_whose_weights_move_draws_the_same(expected, change):
    (use, _), _, _ = expected
    plain, compiled = small_unet(), small_unet()
    change(plain)
    change(compiled)
    prepare_for_compile(compiled)
    compiled.compile(backend="eager")
    for uses in (use, []):
        with inject(plain, uses, rows=ROWS):
            output = call(plain)
        with inject(compiled, uses, rows=ROWS):
            assert torch.equal(call(compiled), output)


def test_a_compiled_pipeline_draws_the_same_in_a_graph_for_each_number_of_predictions(tmp_path):
    plain, compiled = (wrap(tiny_pipeline(tmp_path / name)) for name in "ab")
    compiled.compile(backend="eager", fullgraph=True)
    images = []
    for pipe in (plain, compiled):
        for seed in (0, 1):
            image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))
            use = ReferenceUse(pipe.encode_reference(image), random_adapters(pipe.layout, 5))
            images.append(
                pipe(
                    "a cat",
                    use,
                    image_guidance_scale=0.4,
                    image_range=(0.0, 0.5),
                    num_inference_steps=4,
                    generator=torch.Generator().manual_seed(3),
                    output_type="latent",
                )
            )
            graphs = num_graphs()
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[3])
    assert graphs == 2
