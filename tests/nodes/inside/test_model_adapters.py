"""Adapters fitted to a MODEL by the node: from its weights as they act, the same each time, nothing left behind."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from test_training_nodes import TinyClip
from test_training_nodes import train as train_node
from tiny import (
    CORE,
    IS_DYNAMIC,
    apply,
    encode,
    lora_weights,
    make_model,
    pack_module,
    run,
    said_by_apply,
    sample,
)

FIT = pack_module("nodes.host.training.fit")
ADAPTERS = pack_module("nodes.adapters")
FITTING = pack_module("dreamcache_core.fitting.fit")
INITIALISATION = pack_module("dreamcache_core.training.initialisation")
SITES = pack_module("dreamcache_core.method.backends").select_sites
Interrupted = comfy.model_management.InterruptProcessingException


@pytest.fixture(autouse=True, scope="module")
def few_passes():
    """Two latents of three steps, seen twice, are as good for this."""
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("NUM_LATENTS", 2), ("NUM_STEPS", 3), ("NUM_LOOKS", 2)):
            patch.setattr(FITTING, name, number)
        yield


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def model(request):
    with torch.inference_mode():
        return make_model(request.param)


@pytest.fixture(scope="module")
def fitted(model, few_passes):
    with torch.inference_mode():
        return fit(model)


def fit(model, **inputs):
    given = {"model": model, "clip": TinyClip(model), "seed": 0, "size": 64, **inputs}
    return run("DreamCacheModelAdapters", **given)[0]


def apart(one, other):
    """Difference of two sets of adapters, in shares of the norm of the second."""
    first, second = (torch.cat([p.flatten() for p in each.parameters()]) for each in (one, other))
    return float((first - second).norm() / second.norm())


def test_they_are_its_self_attention_and_can_be_trained(model, fitted):
    assert fitted.info.timestep == 300
    assert "fitted" in fitted.info.extra
    for name, site in SITES(model.model.diffusion_model, fitted.layers).items():
        queries, own = fitted[name].to_q.weight, site.block.attn1.to_q.weight
        torch.testing.assert_close(queries, 1.25 * own.float().cpu(), rtol=2e-3, atol=1e-6)
        assert bool(fitted[name].to_k.weight.isfinite().all())
    assert not any(parameter.is_inference() for parameter in fitted.parameters())
    trained = train_node(model, adapters=fitted, learning_rate=1e-3, steps=1)[0]
    assert 0 < apart(trained, fitted) < 1
    assert "fitted" not in trained.info.extra


def test_training_starts_from_them(model, fitted):
    started = train_node(model, init="fitted", learning_rate=1e-7, steps=1)[0]
    assert apart(started, fitted) < 1e-4
    assert started.info.timestep == fitted.info.timestep
    assert "fitted" not in started.info.extra


def test_a_reference_for_adapters_has_their_timestep_and_layers(model):
    unet = model.model.diffusion_model
    adapters = INITIALISATION.new_adapters(unet, layers=["middle_block.1"], timestep=250)
    own, usual = encode(model, adapters=adapters), encode(model, timestep=250)
    assert (own.timestep, tuple(own.features)) == (250, adapters.layers)
    assert torch.equal(own.features["middle_block.1"], usual.features["middle_block.1"])
    assert len(usual.features) > 1


def test_a_reference_for_another_models_adapters_is_refused(model):
    other = INITIALISATION.new_adapters(make_model("sd21").model.diffusion_model)
    with pytest.raises(CORE.MismatchError):
        encode(model, adapters=other)


def test_a_saved_one_says_what_it_is_when_it_is_loaded(model, fitted, tmp_path, monkeypatch):
    CORE.save_adapters(fitted, tmp_path / "own.safetensors")
    monkeypatch.setattr(ADAPTERS, "adapter_path", lambda name: tmp_path / name)
    loaded, shown = (
        ADAPTERS.LoadAdapters.execute("own.safetensors"),
        "fitted to a model, not trained",
    )
    assert apart(loaded.result[0], fitted) == 0
    assert shown in loaded.ui.value
    assert "connect them to Encode Reference too (or set its timestep to 300)" in loaded.ui.value


def test_two_fits_are_equal_and_leave_nothing_behind(model, fitted):
    before = sample(model)
    state = torch.random.get_rng_state()
    assert apart(fit(model), fitted) == 0
    assert apart(fit(model, seed=1), fitted) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(sample(model), before)
    assert not any(m._forward_pre_hooks for m in model.model.diffusion_model.modules())


def test_images_are_made_with_them(model, fitted):
    reference = encode(model, timestep=300)
    images, plain = sample(apply(model, fitted, reference)), sample(model)
    assert bool(images.isfinite().all())
    assert (images - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(sample(apply(model, fitted, reference, scale=0.0)), plain)


def test_on_another_checkpoint_apply_says_so_and_not_beside_a_lora():
    model, other = make_model("sd15"), make_model("sd15", seed=5)
    patched = comfy.sd.load_lora_for_models(model, None, lora_weights(), 1.0, 0.0)[0]
    adapters, told = fit(model), "fitted to another model"
    reference = encode(model, adapters=adapters)
    assert told in said_by_apply(other, adapters, reference)
    assert told not in said_by_apply(model, adapters, reference)
    assert told not in said_by_apply(patched, adapters, reference)
    assert told not in said_by_apply(other, reference=encode(other))


LOADS = ["load_lora_for_models"]
if hasattr(comfy.sd, "load_bypass_lora_for_models") and not IS_DYNAMIC:
    LOADS.append("load_bypass_lora_for_models")


@pytest.mark.parametrize("load", LOADS)
def test_loras_count_however_they_are_loaded(load):
    model = make_model("sd15")
    patched = getattr(comfy.sd, load)(model, None, lora_weights(), 1.0, 0.0)[0]
    usual = comfy.sd.load_lora_for_models(model, None, lora_weights(), 1.0, 0.0)[0]
    plain, counted = fit(model), fit(patched)
    assert apart(counted, plain) > 1e-2
    assert apart(counted, fit(usual)) < 1e-3
    assert apart(fit(model), plain) == 0


def test_patches_of_other_nodes_do_not_count(model, fitted):
    patched = model.clone()
    patched.set_model_attn1_patch(lambda q, k, v, _: (0 * q, k, v))
    assert apart(fit(patched), fitted) == 0


def test_it_can_be_interrupted(model, fitted, monkeypatch):
    passes = []
    original = FIT.FrozenModel.predict

    def predict(self, *given, **more):
        passes.append(1)
        if len(passes) == 3:
            comfy.model_management.interrupt_current_processing()
        return original(self, *given, **more)

    monkeypatch.setattr(FIT.FrozenModel, "predict", predict)
    with pytest.raises(Interrupted):
        fit(model)
    assert len(passes) == 3
    monkeypatch.undo()
    assert apart(fit(model), fitted) == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({"clip": None}, "needs clip"), ({"size": 60}, "multiple of 8"), ({"size": 8}, "from 64 on")],
    ids=str,
)
def test_bad_input_is_refused(inputs, message):
    with pytest.raises(CORE.InputError, match=message):
        fit(make_model("sd15"), **inputs)


def test_the_clip_of_another_model_is_refused():
    with pytest.raises(CORE.InputError, match="Connect the CLIP of this model"):
        fit(make_model("sd15"), clip=TinyClip(make_model("sd21")))
