"""Encode Reference, and what else looks at a MODEL once, on a MODEL that other nodes have changed."""

import importlib.util
import threading

import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import PatcherInjection
from comfy_extras.nodes_model_advanced import ModelComputeDtype
from tiny import (
    APPLIED,
    CPU,
    IS_DYNAMIC,
    MODEL,
    apply,
    assert_close,
    encode,
    lora_weights,
    make_adapters,
    make_model,
    make_text,
    run,
    sample,
)
from torch import nn


@pytest.fixture
def model():
    return make_model("sd15")


def assert_same(one, other, relative=0.0):
    for layer in other.layers:
        assert_close(one.features[layer], other.features[layer], relative)


def is_same(one, other):
    return all(torch.equal(one.features[layer], other.features[layer]) for layer in other.layers)


# --- other threads and devices -----------------------------------------------------------------------------------


def in_worker_thread(function, *args):
    """Call as ComfyUI's workers do: in a thread that hands back results and ``Exception``s, and nothing else."""
    answers = []

    def work():
        with torch.inference_mode():
            try:
                answers.append((function(*args), None))
            except Exception as error:
                answers.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result, error = answers[0]
    if error:
        raise error
    return result


def test_no_frame_of_comfyuis_sees_that_the_pass_ends_early(model, monkeypatch):
    plain, predict = encode(model), comfy.samplers.calc_cond_batch
    monkeypatch.setattr(
        comfy.samplers, "calc_cond_batch", lambda *args: in_worker_thread(predict, *args)
    )
    assert_same(encode(model), plain)


if importlib.util.find_spec("comfy.multigpu"):
    import comfy.multigpu

    @pytest.fixture
    def split(model, monkeypatch):
        """What MultiGPU CFG Split makes of a MODEL where there are two devices."""
        devices = [CPU, torch.device("cpu", 0)]
        management = comfy.model_management
        monkeypatch.setattr(management, "get_all_torch_devices", lambda **_: devices)
        monkeypatch.setattr(management, "set_torch_device", lambda _: None)
        return comfy.multigpu.create_multigpu_deepclones(model, 2)

    def test_encoding_uses_one_device_of_a_model_that_is_split_over_several(model, split):
        assert len(split.get_additional_models_with_key("multigpu")) == 1
        assert_same(encode(split), encode(model))

    def test_attention_map_of_a_model_that_is_split_over_several_devices(model, split):
        def look(model):
            return run(
                "DreamCacheAttentionMap",
                model=apply(model),
                positive=make_text(model, 1),
                latent={"samples": torch.zeros(1, 4, 16, 16)},
                reference_image=torch.ones(1, 128, 128, 3),
            )[0]

        assert torch.equal(look(split), look(model))


# --- injections --------------------------------------------------------------------------------------------------


def inject_doubling(model):
    """A node that puts a forward of its own into the U-Net, as packs for motion modules do."""
    block = model.model.diffusion_model.middle_block[0]

    def inject(_):
        forward = type(block).forward
        block.forward = lambda *args, **kwargs: 2 * forward(block, *args, **kwargs)

    clone = model.clone()
    clone.set_injections(
        "another", [PatcherInjection(inject, lambda _: vars(block).pop("forward"))]
    )
    return clone


def test_what_another_node_injects_is_left_out_of_the_encoding(model):
    plain, injected = encode(model), inject_doubling(model)
    drawn = sample(injected)
    assert not torch.equal(drawn, sample(model))
    assert_same(encode(injected), plain)
    assert torch.equal(sample(injected), drawn)
    assert_same(encode(injected), plain)  # it is loaded with the injection on it
    assert_same(encode(model), plain)


if hasattr(comfy.sd, "load_bypass_lora_for_models"):

    def with_lora(load, model):
        return load(model, None, lora_weights(), 1.0, 0.0)[0]

    @pytest.fixture
    def bypassing(model):
        """What Load LoRA (Bypass) makes of a MODEL."""
        return with_lora(comfy.sd.load_bypass_lora_for_models, model)

    def test_a_lora_in_bypass_mode_is_part_of_the_encoding(model, bypassing):
        plain = encode(model)
        usual = encode(with_lora(comfy.sd.load_lora_for_models, model))
        assert not is_same(usual, plain)
        assert_same(encode(bypassing), usual, 1e-5)
        assert_same(encode(inject_doubling(bypassing)), usual, 1e-5)
        sample(bypassing)
        assert_same(encode(bypassing), usual, 1e-5)

    def test_encoding_leaves_no_lora_in_bypass_mode_on_the_model(model, bypassing):
        plain, drawn, before = encode(model), sample(bypassing), sample(model)
        encode(bypassing)
        assert torch.equal(sample(model), before)
        encode(bypassing)
        assert_same(encode(model), plain)
        assert torch.equal(sample(bypassing), drawn)


# --- replaced modules --------------------------------------------------------------------------------------------


class OtherAttention(nn.Module):
    """An attention of another pack, with nothing of the original's but its output."""

    def __init__(self, original):
        super().__init__()
        self.original = [original]  # not a module of this one

    def forward(self, *args, **kwargs):
        return 0.9 * self.original[0](*args, **kwargs)


def test_a_model_whose_attention_another_node_has_replaced_is_encoded_and_applied_to(model):
    adapters, reference, replaced = make_adapters(model), encode(model), model.clone()
    for name, module in model.model.named_modules():
        if name.endswith((".attn1", ".attn2")):
            replaced.add_object_patch(name, OtherAttention(module))
    drawn = sample(replaced)  # from here on the modules are in the U-Net
    assert not torch.equal(sample(apply(replaced, adapters, reference)), drawn)
    assert_same(encode(replaced), reference)
    sample(replaced)
    assert_same(encode(model), reference)
    sample(replaced)
    assert not torch.equal(sample(apply(model, adapters, reference)), sample(model))


if (
    IS_DYNAMIC
):  # ComfyUI cannot sample there with replaced modules whose weights are as small as these
    del test_a_model_whose_attention_another_node_has_replaced_is_encoded_and_applied_to


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("default", torch.float32)])
def test_adapters_compute_as_model_compute_dtype_says(model, name, dtype):
    changed = ModelComputeDtype().patch(model, name)[0]
    assert MODEL.compute_dtype(changed) == dtype
    applied = apply(changed, make_adapters(model), encode(model))
    fused = APPLIED.applied_to(applied).uses[0].patcher.model
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
    assert bool(sample(applied).isfinite().all())
