"""References in models that the real TorchCompileModel, or another node by ComfyUI's function for it, has compiled."""

import gc
import weakref

import comfy.ldm.modules.attention as comfy_attention
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel
from tiny import (
    PATCHES,
    apply,
    assert_close,
    encode,
    make_adapters,
    make_model,
    pack_module,
    sample,
)

COMPILED = pack_module("nodes.host.unet.compiled")
SMALL = {
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
}
INPUTS = {"steps": 3, "size": (8, 8)}
UNCOMPILED = "Steps in which a reference acts run uncompiled"


def compiled(model, backend="eager"):
    """``eager`` computes what the compiler has traced as it stands: the results are the same to the bit."""
    return TorchCompileModel.execute(model, backend=backend).result[0]


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def half_region():
    mask = torch.zeros((1, 64, 64))
    mask[..., :32] = 1
    return mask


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traceable_attention(monkeypatch):
    """ComfyUI's choice on a GPU; that for CPUs asks for free memory in every block, which breaks the graph."""
    for module, name in (
        (comfy_attention, "optimized_attention"),
        (comfy_attention, "optimized_attention_masked"),
        (PATCHES, "optimized_attention"),
    ):
        monkeypatch.setattr(module, name, comfy_attention.attention_pytorch)


@pytest.fixture
def parts():
    model = make_model(**SMALL)
    return model, make_adapters(model), encode(model)


@pytest.mark.usefixtures("traceable_attention")
def test_steps_with_references_are_one_graph_that_serves_others_of_the_same_shapes(parts, caplog):
    model, adapters, reference = parts
    base = compiled(model)
    assert torch.equal(sample(base, **INPUTS), sample(model, **INPUTS))
    assert num_graphs() == 1
    first = sample(apply(base, adapters, reference), **INPUTS)
    assert torch.equal(first, sample(apply(model, adapters, reference), **INPUTS))
    assert num_graphs() == 2
    for changed in (
        {"scale": 0.5},
        {"scale": 1.25},
        {"start_percent": 0.3, "end_percent": 0.8},
        {"end_percent": 0.5},
        {"reference": encode(model, seed=3)},
        {"adapters": make_adapters(model, seed=3)},
    ):
        inputs = {"adapters": adapters, "reference": reference, **changed}
        expected = sample(apply(model, **inputs), **INPUTS)
        assert torch.equal(sample(apply(base, **inputs), **INPUTS), expected)
        assert torch.equal(sample(compiled(apply(model, **inputs)), **INPUTS), expected)
        assert not torch.equal(expected, first)
    assert torch.equal(sample(base, **INPUTS), sample(model, **INPUTS))
    # the plain graph of ComfyUI before 0.8.0 knows how many wrappers of others there are
    assert num_graphs() <= 3
    assert UNCOMPILED not in caplog.text


@pytest.mark.usefixtures("traceable_attention")
@pytest.mark.parametrize("scales", [(0.5,), (0.5, 1.5)], ids=["one", "two"])
def test_regions_and_further_references_give_what_they_give_uncompiled(parts, scales):
    model, adapters, reference = parts
    results = []
    for patched in (model, compiled(model)):
        for seed, scale in enumerate(scales):
            mask = half_region() if seed == 0 else None
            reference = encode(model, seed=seed)
            patched = apply(patched, adapters, reference, scale=scale, mask=mask)
        results.append(sample(patched, **INPUTS))
    assert_close(results[1], results[0])
    assert num_graphs() == 1


@pytest.mark.usefixtures("traceable_attention")
def test_compiled_half_precision_keeps_the_scale_exact(caplog):
    model = make_model(dtype=torch.bfloat16, **SMALL)
    adapters, reference = make_adapters(model), encode(model)
    uncompiled, ours = (
        sample(apply(each, adapters, reference, scale=1.3), **INPUTS)
        for each in (model, compiled(model))
    )
    assert torch.equal(ours, uncompiled)
    assert num_graphs() == 1
    assert UNCOMPILED not in caplog.text


def test_what_cannot_be_one_graph_runs_uncompiled_and_says_so_once(parts, caplog):
    model, adapters, reference = parts
    base = compiled(model)
    for settings in ({}, {"start_percent": 0.3, "end_percent": 0.8}):
        expected = sample(apply(model, adapters, reference, **settings), **INPUTS)
        assert torch.equal(sample(apply(base, adapters, reference, **settings), **INPUTS), expected)
    assert caplog.text.count(UNCOMPILED) == 1
    assert torch.equal(sample(base, **INPUTS), sample(model, **INPUTS))
    assert num_graphs() > 1


@pytest.mark.usefixtures("traceable_attention")
def test_more_kinds_of_calls_than_are_kept_run_uncompiled(parts, caplog, monkeypatch):
    monkeypatch.setattr(COMPILED, "MOST_GRAPHS", 1)
    model, adapters, reference = parts
    base = compiled(model)
    for settings in ({}, {"mask": half_region()}):
        expected = sample(apply(model, adapters, reference, **settings), **INPUTS)
        assert torch.equal(sample(apply(base, adapters, reference, **settings), **INPUTS), expected)
    assert num_graphs() == 1
    assert caplog.text.count(UNCOMPILED) == 1


@pytest.mark.usefixtures("traceable_attention")
def test_references_act_where_blocks_of_the_unet_are_compiled(parts):
    model, adapters, reference = parts
    base = model.clone()
    block = "diffusion_model.middle_block.1.transformer_blocks.0"
    set_torch_compile_wrapper(base, backend="eager", keys=[block])
    assert torch.equal(sample(base, **INPUTS), sample(model, **INPUTS))
    assert num_graphs() > 0
    ours = sample(apply(base, adapters, reference), **INPUTS)
    assert torch.equal(ours, sample(apply(model, adapters, reference), **INPUTS))


@pytest.mark.usefixtures("traceable_attention")
def test_compiled_code_keeps_no_keys_and_values(parts, monkeypatch, caplog):
    model, adapters, reference = parts
    known = []

    def noted(*args, **kwargs):
        prepared = prepare_layer(*args, **kwargs)
        known.append(weakref.ref(prepared.key))
        return prepared

    prepare_layer = PATCHES.prepare_layer
    monkeypatch.setattr(PATCHES, "prepare_layer", noted)
    sample(apply(compiled(model), adapters, reference), **INPUTS)
    gc.collect()
    assert known
    assert all(key() is None for key in known)
    assert num_graphs() == 1
    assert UNCOMPILED not in caplog.text
