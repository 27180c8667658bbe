"""DreamCache from Photo: what its parts do one after the other, adapters of the model included."""

from dataclasses import replace

import pytest
import torch
from test_company import add_lora
from test_model_adapters import few_passes as few_passes
from test_training_nodes import TinyClip
from tiny import (
    CORE,
    FlatVAE,
    apply,
    execute,
    make_adapters,
    make_image,
    make_model,
    pack_module,
    run,
    sample,
)

PHOTO = pack_module("nodes.photo")
ADAPTERS = pack_module("nodes.adapters")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def model(request):
    with torch.inference_mode():
        return make_model(request.param)


@pytest.fixture(scope="module")
def mask():
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 40:80] = 1
    return mask


def from_photo(model, **inputs):
    given = {
        "model": model,
        "vae": FlatVAE(),
        "clip": TinyClip(model),
        "image": make_image(3),
        "size": 64,
    }
    return execute("DreamCacheFromPhoto", **{**given, "strength": "balanced", **inputs})


@pytest.mark.parametrize(
    ("inputs", "guidance"),
    [
        ({"strength": "scene"}, 0.4),
        ({"strength": "balanced", "image_guidance": 7.0}, 1.0),
        ({"strength": "likeness"}, 2.0),
        ({"strength": "custom", "image_guidance": 0.7}, 0.7),
    ],
    ids=lambda value: str(value),
)
def test_it_does_what_its_parts_do(model, mask, inputs, guidance):
    adapters = make_adapters(model)
    out = from_photo(model, loaded_adapters=adapters, mask=1 - mask, **inputs)
    image, subject = run("DreamCacheReferenceImage", image=make_image(3), mask=mask, size=64)
    parts = {"model": model, "image": image, "mask": subject, "mask_marks": "subject"}
    reference = run(
        "DreamCacheEncode", **parts, vae=FlatVAE(), clip=TinyClip(model), adapters=adapters
    )[0]
    expected = sample(apply(model, adapters, reference, image_guidance=guidance))
    assert torch.equal(sample(out.result[0]), expected)
    features = out.result[1].features
    assert all(torch.equal(features[name], reference.features[name]) for name in adapters.layers)


def test_a_number_that_a_word_overrides_is_said(model, mask):
    given = {"loaded_adapters": make_adapters(model), "mask": mask, "image_guidance": 5.0}
    (text,) = from_photo(model, **given).ui["text"]
    assert "image_guidance 5 has no effect, as strength is balanced: choose custom" in text
    (text,) = from_photo(model, **given, strength="custom").ui["text"]
    assert "no effect" not in text


def test_it_shows_what_the_model_sees_and_says_what_it_did(model, mask):
    said = from_photo(model, loaded_adapters=make_adapters(model), mask=1 - mask).ui
    assert len(said["images"]) == 1
    (text,) = said["text"]
    for part in (
        "the mask was turned round",
        "subject covers 16 %",
        "subject 1",
        "adapters: connected",
    ):
        assert part in text
    (bare,) = from_photo(model, loaded_adapters=make_adapters(model)).ui["text"]
    assert "no mask: the background is in the reference" in bare


def test_adapters_are_fitted_once_for_a_model_and_anew_for_a_lora(model, monkeypatch):
    fits = []
    original = PHOTO.fit_to_model

    def fit(*given, **settings):
        fits.append(settings["size_px"])
        return original(*given, **settings)

    monkeypatch.setattr(PHOTO, "fit_to_model", fit)
    first, second = (
        from_photo(model, adapters="from this model", image=make_image(seed)) for seed in (1, 2)
    )
    assert fits == [64]
    assert "fitted" in first.ui["text"][0]
    assert first.result[1].timestep == second.result[1].timestep == 300
    assert not torch.equal(sample(first.result[0]), sample(second.result[0]))
    with_lora = add_lora(model)
    from_photo(with_lora, adapters="from this model")
    from_photo(with_lora, adapters="from this model", size=128)
    assert fits == [64, 64, 128]


def test_a_file_is_loaded_and_another_models_is_refused(model, tmp_path, monkeypatch):
    CORE.save_adapters(make_adapters(model), tmp_path / "own.safetensors")
    CORE.save_adapters(make_adapters(make_model("sd21")), tmp_path / "other.safetensors")
    monkeypatch.setattr(PHOTO, "adapter_path", lambda name: tmp_path / name)
    out = from_photo(model, adapters="own.safetensors")
    expected = apply(model, make_adapters(model), out.result[1], image_guidance=1.0)
    assert torch.equal(sample(out.result[0]), sample(expected))
    with pytest.raises(CORE.MismatchError, match="no file: 'from this model'"):
        from_photo(model, adapters="other.safetensors")


@pytest.mark.parametrize(
    ("files", "default"), [([], "from this model"), (["a"], "a"), (["a", "b"], "from this model")]
)
def test_the_only_file_is_chosen_by_itself(files, default, monkeypatch):
    monkeypatch.setattr(PHOTO, "list_adapter_files", lambda: files or [PHOTO.NO_ADAPTERS])
    combo = {item.id: item for item in PHOTO.FromPhoto.define_schema().inputs}["adapters"]
    assert (combo.options, combo.default) == (["from this model", *files], default)


def test_the_only_file_is_not_chosen_where_it_is_the_demo_models(model, tmp_path, monkeypatch):
    monkeypatch.setattr(PHOTO, "list_adapter_files", lambda: ["a.safetensors"])
    monkeypatch.setattr(PHOTO, "adapter_path", lambda name: tmp_path / name)
    adapters = make_adapters(model)
    for width, default in ((128, "from this model"), (768, "a.safetensors")):
        layout = replace(adapters.info.layout, context_width=width)
        CORE.save_adapters(
            CORE.AdapterSet(replace(adapters.info, layout=layout)), tmp_path / "a.safetensors"
        )
        combo = {item.id: item for item in PHOTO.FromPhoto.define_schema().inputs}["adapters"]
        assert combo.default == default
    monkeypatch.setattr(PHOTO, "adapter_path", lambda _: tmp_path)  # no file, but a folder
    combo = {item.id: item for item in PHOTO.FromPhoto.define_schema().inputs}["adapters"]
    assert combo.default == "a.safetensors"


def test_a_file_that_is_gone_is_named_before_anything_runs():
    assert PHOTO.FromPhoto.validate_inputs("from this model") is True
    assert "gone.safetensors" in str(PHOTO.FromPhoto.validate_inputs("gone.safetensors"))
