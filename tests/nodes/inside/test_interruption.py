"""A run that is interrupted leaves nothing behind."""

import comfy.model_management
import comfy.utils
import pytest
import torch
from tiny import (
    APPLIED,
    apply,
    encode,
    make_adapters,
    make_image,
    make_model,
    make_text,
    sample,
)

import nodes as comfy_nodes

Interrupted = comfy.model_management.InterruptProcessingException


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        model = make_model()
        return model, make_adapters(model), encode(model)


def raise_it():
    raise Interrupted


def press_cancel():
    """What the server does when somebody presses the button."""
    comfy.model_management.interrupt_current_processing(True)


@pytest.fixture(params=[raise_it, press_cancel], ids=["exception", "flag"])
def interrupt_at_second_call(request, monkeypatch):
    """Interrupt in the middle of the U-Net's second call; the progress bar reads the flag, as in the server."""

    def on_progress(*_, **__):
        comfy.model_management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", on_progress)

    def run_interrupted(model, action):
        calls = []

        def hook(*_):
            calls.append(1)
            if len(calls) == 2:
                request.param()

        handle = model.model.diffusion_model.input_blocks[1][0].register_forward_pre_hook(hook)
        try:
            with pytest.raises(Interrupted):
                action()
        finally:
            handle.remove()
            comfy.model_management.interrupt_current_processing(False)
        assert len(calls) == 2

    return run_interrupted


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return [
        hook
        for module in model.model.modules()
        for kind in kinds
        for hook in getattr(module, kind).values()
    ]


def ksampler(model):
    latent = {"samples": torch.zeros((1, 4, 16, 16))}
    texts = make_text(model, 1), make_text(model, 2)
    return comfy_nodes.KSampler().sample(model, 5, 3, 7.5, "euler", "normal", *texts, latent)[0][
        "samples"
    ]


def assert_untouched(model):
    assert not hooks_of(model)
    assert not any(by_key for by_key in model.wrappers.values())
    assert not model.attachments
    assert not model.additional_models
    assert not model.object_patches
    assert not model.patches
    assert model.model_options == {"transformer_options": {}}
    assert "forward" not in vars(model.model.diffusion_model)


def test_interrupted_sampling_leaves_nothing_behind(parts, interrupt_at_second_call):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    plain, expected = ksampler(model), ksampler(applied)
    options = dict(applied.model_options["transformer_options"])
    interrupt_at_second_call(model, lambda: ksampler(applied))
    assert_untouched(model)
    assert applied.model_options["transformer_options"] == options
    assert not hooks_of(applied)
    assert torch.equal(ksampler(model), plain)
    assert torch.equal(ksampler(applied), expected)


def test_interrupted_encoding_leaves_nothing_behind(parts, interrupt_at_second_call):
    model, adapters, reference = parts
    plain, expected = ksampler(model), ksampler(apply(model, adapters, reference))
    images = make_image(batch=3)
    interrupt_at_second_call(model, lambda: encode(model, image=images))
    assert_untouched(model)
    assert torch.equal(ksampler(model), plain)
    again = encode(model)
    for layer in reference.layers:
        assert torch.equal(again.features[layer], reference.features[layer])
    assert torch.equal(ksampler(apply(model, adapters, again)), expected)


def test_interrupted_encoding_leaves_an_applied_model_as_it_was(parts, interrupt_at_second_call):
    model, adapters, reference = parts
    applied = apply(model, adapters, reference)
    expected = sample(applied)
    interrupt_at_second_call(model, lambda: encode(applied, image=make_image(batch=2)))
    assert APPLIED.applied_to(applied) is not None
    assert_untouched(model)
    assert torch.equal(sample(applied), expected)


def test_torch_compile_comes_back_after_an_interruption(parts, interrupt_at_second_call):
    model, adapters, reference = parts
    stance = torch._dynamo.eval_frame._stance
    interrupt_at_second_call(model, lambda: ksampler(apply(model, adapters, reference)))
    assert torch._dynamo.eval_frame._stance is stance
