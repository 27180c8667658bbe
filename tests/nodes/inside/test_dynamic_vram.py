"""What ComfyUI's dynamic VRAM asks of us; all other tests run in this mode too."""

import gc
import weakref

import comfy.model_management
import comfy.sd
import comfy_aimdo.control
import pytest
import torch
from test_company import add_lora
from test_training_nodes import same, train
from tiny import CORE, apply, assert_close, encode, lora_weights, make_adapters, make_model, sample

LIBRARY = comfy_aimdo.control.lib
FP16, FP32 = torch.float16, torch.float32


def patcher_of(applied):
    return applied.get_additional_models_with_key("dreamcache")[0]


@pytest.fixture
def no_memory(monkeypatch):
    """No weight can stay: each is cast into a buffer that the next one is cast into too."""
    monkeypatch.setattr(LIBRARY, "capacity", 0)


def test_the_mode_is_on_and_pages_are_lost():
    model = make_model()
    assert model.is_dynamic()
    plain = sample(model)
    assert 0 < LIBRARY.used <= LIBRARY.capacity < model.model_size()
    comfy.model_management.unload_all_models()
    assert LIBRARY.used == 0
    assert torch.equal(sample(model), plain)


def test_adapters_lie_in_the_models_float_type():
    model = make_model(dtype=FP16)
    applied = apply(model, make_adapters(model), encode(model), image_guidance=1)
    sample(applied, steps=1)
    patcher = patcher_of(applied)
    assert {p.dtype for p in patcher.model.parameters()} == {FP16}
    used_by_adapters = patcher.loaded_size()
    assert 0 < used_by_adapters < 1.1 * 2 * patcher.model.num_parameters


def test_adapters_leave_the_run_to_dynamic_memory(caplog):
    model = make_model()
    applied = apply(model)
    assert patcher_of(applied).is_dynamic()
    caplog.set_level("DETAIL")
    sample(applied)
    assert "Non dynamic memory free" not in caplog.text
    comfy.model_management.unload_all_models()
    assert "Non dynamic memory free" in caplog.text


def test_adapters_can_be_copied_without_dynamic_memory():
    model = make_model()
    applied = apply(model)
    dynamic = patcher_of(applied)
    sample(applied)
    copy = dynamic.get_non_dynamic_delegate()
    assert not copy.is_dynamic()
    assert copy.model is not dynamic.model
    for mine, theirs in zip(copy.model.parameters(), dynamic.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def test_training_after_a_generation():
    model, untouched = make_model(), make_model()
    sample(model)
    adapters, _ = train(model)
    assert same(adapters, train(untouched)[0])


def test_the_model_that_training_has_read_is_freed():
    model, read = make_model(), []
    load = model.cached_patcher_init[0]

    def load_and_note(**options):
        patcher = load(**options)
        read.append(weakref.ref(patcher.model))
        return patcher

    model.cached_patcher_init = (load_and_note, ())
    train(model)
    gc.collect()
    assert [module() for module in read] == [None]


def test_training_on_a_float32_file_that_computes_in_float16():
    model = make_model(dtype=FP16, in_file=FP32)
    sample(model)
    adapters, _ = train(model)
    expected, _ = train(make_model(dtype=FP16))
    assert same(adapters, expected)


@pytest.mark.usefixtures("no_memory")
def test_training_with_too_little_memory_has_the_right_gradients(monkeypatch):
    adapters, _ = train(make_model())
    monkeypatch.undo()
    assert same(adapters, train(make_model())[0])


def test_training_counts_a_lora_in_the_start_from_self_attention():
    model = make_model()
    plain, _ = train(model, init="self_attention", steps=1)
    with_lora, _ = train(add_lora(model), init="self_attention", steps=1)
    layer = with_lora.layers[0]
    changed = (with_lora[layer].to_v.weight - plain[layer].to_v.weight).abs().max()
    assert changed > 0.01


def test_training_on_a_model_that_cannot_be_read_again_is_refused():
    model = make_model()
    model.cached_patcher_init = None
    with pytest.raises(CORE.StateError, match="--disable-dynamic-vram"):
        train(model)


def test_training_with_a_lora_in_bypass_mode_is_refused():
    model = comfy.sd.load_bypass_lora_for_models(make_model(), None, lora_weights(), 1.0, 0.0)[0]
    with pytest.raises(CORE.StateError, match="Load LoRA"):
        train(model)


@pytest.mark.usefixtures("no_memory")
def test_the_reference_acts_with_too_little_memory(monkeypatch):
    model = make_model()
    adapters, reference = make_adapters(model), encode(model)
    ours = sample(apply(model, adapters, reference))
    monkeypatch.undo()
    assert_close(ours, sample(apply(model, adapters, reference)))
