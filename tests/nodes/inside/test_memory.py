"""What ComfyUI's memory management sees of DreamCache, and what is left when a run is over."""

import copy
import gc
import weakref

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from tiny import (
    APPLIED,
    CORE,
    IS_DYNAMIC,
    PATCHES,
    RUN,
    apply,
    encode,
    make_adapters,
    make_model,
    run,
    sample,
)


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        model = make_model()
        return model, make_adapters(model), encode(model)


def patcher_of(applied):
    (patcher,) = APPLIED.applied_to(applied).patchers
    return patcher


if not IS_DYNAMIC:  # where models are not loaded in part

    @pytest.mark.parametrize("lowvram_bytes", [64, 100_000])
    def test_partially_loaded_adapters_give_the_same_image(parts, monkeypatch, lowvram_bytes):
        model, adapters, reference = parts
        applied = apply(model, adapters, reference)
        whole = sample(applied)
        comfy.model_management.unload_all_models()
        fused = patcher_of(applied).model
        original = comfy.model_patcher.ModelPatcher.load
        loaded = []

        def load(self, *args, **kwargs):
            if self.model is fused:
                kwargs |= {"lowvram_model_memory": lowvram_bytes, "full_load": False}
                loaded.append(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load)
        held = []
        hook = model.model.diffusion_model.register_forward_pre_hook(
            lambda *_: held.append((fused.model_lowvram, fused.model_loaded_weight_memory))
        )
        partial = sample(applied)
        hook.remove()
        assert loaded
        assert all(is_partial and size <= lowvram_bytes for is_partial, size in held)
        assert torch.equal(partial, whole)


def test_adapters_are_among_the_loaded_models(parts):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    fused, during = patcher_of(applied).model, []

    def look(*_):
        loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models]
        during.append(sum(module is fused for module in loaded))

    hook = model.model.diffusion_model.register_forward_pre_hook(look)
    sample(apply(applied, adapters, reference))
    hook.remove()
    assert set(during) == {1}
    entries = [e for e in comfy.model_management.current_loaded_models if e.model.model is fused]
    assert [e.model_memory() for e in entries] == [sum(p.nbytes for p in fused.parameters())]


@pytest.fixture
def requested(monkeypatch):
    """Memory that a sampling run of a MODEL asks ComfyUI for, bytes."""
    original = comfy.model_management.load_models_gpu
    asked = []

    def load(models, memory_required=0, **kwargs):
        asked.append(memory_required)
        return original(models, memory_required=memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)

    def measure(model, **inputs):
        asked.clear()
        sample(model, steps=1, **inputs)
        return asked[0]

    return measure


def test_memory_estimate_counts_the_third_row_and_keys_and_values(parts, requested):
    model, adapters, reference = parts
    plain = requested(model, batch=4)
    joint = requested(apply(model, adapters, reference, guidance="joint"), batch=4)
    three_rows = requested(apply(model, adapters, reference), batch=4)
    per_row = plain / 8
    kv_bytes = 2 * 4 * sum(f.numel() for f in reference.features.values())
    column = plain / 16  # the estimate grows by whole columns of the latent
    assert plain + kv_bytes <= joint <= plain + kv_bytes + column
    third = plain + 4 * per_row + kv_bytes
    assert third <= three_rows <= third + column
    assert requested(apply(model, adapters, reference, scale=0.0), batch=4) == plain


def test_memory_estimate_grows_with_the_number_of_references(parts, requested):
    model, adapters, small = parts
    # enough images to show in whole rows
    reference = CORE.ReferenceCache.concatenate([small] * 128)
    one = apply(model, adapters, reference)
    two = apply(one, adapters, reference)
    assert requested(two, size=(8, 8)) > requested(one, size=(8, 8))


@pytest.fixture
def keys(monkeypatch):
    """Weak references to all keys and values that runs compute."""
    original, seen = PATCHES.prepare_layer, []

    def prepare(*args, **kwargs):
        layer = original(*args, **kwargs)
        seen.extend(weakref.ref(item) for item in (layer, layer.key, layer.value))
        return layer

    monkeypatch.setattr(PATCHES, "prepare_layer", prepare)
    return seen


def test_keys_and_values_are_made_once_a_run_and_gone_after_it(parts, keys):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    sample(applied, steps=4, batch=2)
    gc.collect()
    assert len(keys) == 3 * len(adapters.layers)
    assert not [item for item in keys if item() is not None]
    sample(applied)
    assert len(keys) == 2 * 3 * len(adapters.layers)


def test_keys_and_values_are_gone_after_a_run_that_failed(parts, keys):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of something")

    hook = model.model.diffusion_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of something"):
        sample(applied)
    hook.remove()
    gc.collect()
    assert len(keys) == 3 * len(adapters.layers)
    assert not [item for item in keys if item() is not None]


def test_adapters_leave_when_comfyui_unloads_all_models(parts):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    sample(applied)
    patcher = patcher_of(applied)
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
    assert patcher.loaded_size() == 0
    assert {p.device for p in patcher.model.parameters()} == {patcher.offload_device}


def test_fused_adapters_are_freed_with_what_made_them(parts):
    model, _, reference = parts
    adapters = make_adapters(model)
    applied = apply(model, adapters, reference)
    sample(applied)
    fused = weakref.ref(patcher_of(applied).model)
    comfy.model_management.unload_all_models()
    del applied
    gc.collect()
    assert fused() is not None  # the next Apply of the same adapters takes them again
    del adapters
    gc.collect()
    assert fused() is None


def test_references_stay_on_the_cpu_and_are_counted(parts):
    model, adapters, reference = parts
    both = run("DreamCacheCombineReferences", reference_1=reference, reference_2=reference)[0]
    sample(apply(model, adapters, both))
    tensors = list(both.features.values())
    assert {t.device.type for t in tensors} == {"cpu"}
    assert both.get_ram_usage() == sum(t.numel() * t.element_size() for t in tensors)
    assert both.get_ram_usage() == 2 * reference.get_ram_usage() > 0
    half = torch.zeros((1, 128, 128))
    half[:, 64:] = 1
    masked = encode(model, mask=half, mask_marks="subject")
    assert masked.get_ram_usage() == reference.get_ram_usage() + sum(
        mask.numel() for mask in masked.masks.values()
    )


def walk(value):
    """All objects in nested containers, closures left out: ComfyUI shares those."""
    yield value
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set)):
        for item in value:
            yield from walk(item)


def test_model_options_hold_nothing_that_a_copy_would_double(parts, monkeypatch):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    assert not list(tensors_and_modules(applied.model_options))
    seen = []
    original = comfy.samplers.CFGGuider.predict_noise

    def predict_noise(self, x, timestep, model_options, seed=None):
        stores = [item for item in walk(model_options) if isinstance(item, RUN.RunStore)]
        seen.append((len(list(tensors_and_modules(model_options))), len(stores)))
        assert all(copy.deepcopy(store) is store for store in stores)
        return original(self, x, timestep, model_options, seed)

    monkeypatch.setattr(comfy.samplers.CFGGuider, "predict_noise", predict_noise)
    sample(applied)
    # ComfyUI itself adds the tensor of the run's sigmas
    assert seen == [(1, 1)] * 3


def tensors_and_modules(options):
    kinds = (
        torch.Tensor,
        torch.nn.Module,
        comfy.model_patcher.ModelPatcher,
        CORE.ReferenceCache,
        APPLIED.AppliedUse,
    )
    return (item for item in walk(options) if isinstance(item, kinds))


def test_clones_share_the_adapters_and_the_reference(parts):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    expected = sample(applied)
    gc.collect()
    before = count_fused()
    last = applied
    for _ in range(3):
        last = last.clone()
    assert APPLIED.applied_to(last) is APPLIED.applied_to(applied)
    (patcher,) = last.get_additional_models_with_key(APPLIED.KEY)
    assert patcher.model is patcher_of(applied).model
    assert torch.equal(sample(last), expected)
    assert count_fused() == before


def count_fused():
    return sum(type(item) is CORE.FusedAdapterSet for item in gc.get_objects())
