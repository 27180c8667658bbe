"""Float types of base weights, computation and adapters; overflow in Stable Diffusion 2.x's attention."""

import copy

import pytest
import torch
from comfy.ldm.modules.attention import attention_basic
from tiny import (
    APPLIED,
    apply,
    assert_close,
    encode,
    make_adapters,
    make_image,
    sample,
)
from tiny import make_model as make_tiny_model

# two levels are enough here
SMALL = {
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
}
FP32, FP16, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn


def make_model(kind="sd15", **inputs):
    return make_tiny_model(kind, **inputs, **SMALL)


def round_weights(model, dtype):
    """The float32 model whose weights are those of the type."""
    for parameter in model.model.diffusion_model.parameters():
        parameter.copy_(parameter.to(dtype).float())
    return model


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def applied_with(model, adapters):
    # a reference of 8 x 8 latents: its tokens can be told from the image's
    return apply(model, adapters, encode(model, image=make_image(0, 64, 64)))


@pytest.mark.parametrize("storage", [FP16, BF16, FP8])
def test_weights_of_other_types_cast_to_float32_equal_a_float32_model_of_the_same_values(storage):
    model = make_model(dtype=storage, manual_cast=FP32)
    expected = round_weights(make_model(), storage)
    adapters = make_adapters(model)
    ours = sample(applied_with(model, adapters), steps=2)
    assert ours.isfinite().all()
    assert_close(ours, sample(applied_with(expected, adapters), steps=2), 1e-5)


# largest error / largest value after one step of cfg 7.5; at most five times that of the plain model
COMPUTE = [
    pytest.param(FP16, None, FP16, 0.02, id="fp16"),
    pytest.param(BF16, None, BF16, 0.1, id="bf16"),
    pytest.param(FP32, FP16, FP32, 0.02, id="fp32 weights in fp16"),
    pytest.param(FP8, FP16, FP8, 0.02, id="fp8 weights in fp16"),
    pytest.param(FP8, BF16, FP8, 0.1, id="fp8 weights in bf16"),
]


@pytest.mark.parametrize(("storage", "compute", "rounded", "tolerance"), COMPUTE)
@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_half_precision_is_close_to_float32(kind, storage, compute, rounded, tolerance):
    model = make_model(kind, dtype=storage, manual_cast=compute)
    reference_model = round_weights(make_model(kind), rounded)
    adapters = make_adapters(model)
    plain_error = relative_error(sample(model, steps=1), sample(reference_model, steps=1))
    ours = sample(applied_with(model, adapters), steps=1)
    assert ours.isfinite().all()
    error = relative_error(ours, sample(applied_with(reference_model, adapters), steps=1))
    assert error <= tolerance
    assert error <= 5 * plain_error


@pytest.mark.parametrize(
    ("storage", "compute"), [(FP32, None), (FP16, None), (BF16, None), (FP8, FP16), (FP16, FP32)]
)
def test_adapters_are_stored_in_the_type_that_the_model_computes_in(storage, compute):
    model = make_model(dtype=storage, manual_cast=compute)
    applied = applied_with(model, make_adapters(model))
    (patcher,) = APPLIED.applied_to(applied).patchers
    assert {p.dtype for p in patcher.model.parameters()} == {compute or storage}
    sample(applied, steps=1)
    assert {p.dtype for p in patcher.model.parameters()} == {compute or storage}


@pytest.mark.parametrize("compute", [FP32, FP16])
def test_adapters_from_a_half_precision_file_equal_float32_ones_of_the_same_values(compute):
    model = make_model(dtype=compute)
    with torch.inference_mode(False), torch.no_grad():
        half = copy.deepcopy(make_adapters(model)).to(FP16)
        full = copy.deepcopy(half).to(FP32)
    assert torch.equal(
        sample(applied_with(model, half), steps=1), sample(applied_with(model, full), steps=1)
    )


def test_adapters_are_fused_once_for_each_type():
    model, half = make_model(), make_model(dtype=FP16)
    adapters = make_adapters(model)
    modules = [
        APPLIED.applied_to(applied_with(m, adapters)).patchers[0].model
        for m in (model, half, model, half)
    ]
    assert modules[0] is modules[2]
    assert modules[1] is modules[3]
    assert modules[0] is not modules[1]


@pytest.mark.parametrize(("kind", "expected"), [("sd21", FP32), ("sd15", None)])
def test_reference_attention_gets_the_attention_precision_of_the_model(kind, expected):
    model = make_model(kind)
    reference_tokens = {64, 16}  # 8 x 8 latents at each depth
    seen = []

    def spy(function, q, k, v, heads, **kwargs):
        if k.shape[1] in reference_tokens and k.shape[1] != q.shape[1]:
            seen.append((k.shape[1], kwargs.get("attn_precision")))
        return function(q, k, v, heads, **kwargs)

    applied = applied_with(model, make_adapters(model))
    applied.model_options["transformer_options"]["optimized_attention_override"] = spy
    sample(applied, steps=1)
    assert len(seen) == len(make_adapters(model).layers)
    assert {precision for _, precision in seen} == {expected}


@pytest.mark.parametrize(("kind", "is_finite"), [("sd21", True), ("sd15", False)])
def test_logits_beyond_half_precision_do_not_overflow_in_sd2(kind, is_finite):
    model = make_model(kind, dtype=FP16)
    adapters = make_adapters(model)
    for layer in adapters:
        for projection in (adapters[layer].to_q, adapters[layer].to_k):
            projection.weight.mul_(200)  # queries and keys stay below 65504, their products do not

    def basic(_, *args, **kwargs):
        return attention_basic(*args, **kwargs)

    applied = applied_with(model, adapters)
    applied.model_options["transformer_options"]["optimized_attention_override"] = basic
    # without the precision that SD 2.x asks for the same logits do overflow: the test can fail
    assert bool(sample(applied, steps=1).isfinite().all()) == is_finite
