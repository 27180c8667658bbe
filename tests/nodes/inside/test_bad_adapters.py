"""Adapters and models that do not belong together, and files that are no adapters, through the nodes."""

import logging
from dataclasses import replace
from pathlib import Path

import comfy_extras.nodes_model_advanced as advanced
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from tiny import CORE, apply, encode, make_adapters, make_model, run, said_by_apply, sample

import nodes as comfy_nodes

NAMES = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1", "sdxl": "SDXL"}


@pytest.fixture(scope="module")
def models():
    with torch.inference_mode():
        return {kind: make_model(kind) for kind in ("sd15", "sd21", "sdxl")}


@pytest.fixture
def folder():
    path = Path(folder_paths.get_folder_paths("dreamcache")[0])
    before = set(path.rglob("*"))
    yield path
    for file in set(path.rglob("*")) - before:
        file.unlink()
    folder_paths.filename_list_cache.clear()


def options():
    folder_paths.filename_list_cache.clear()
    return (
        comfy_nodes.NODE_CLASS_MAPPINGS["DreamCacheLoadAdapters"].define_schema().inputs[0].options
    )


def test_without_a_file_the_combo_says_where_to_put_one(folder):
    (only,) = options()
    assert "models/dreamcache" in only
    with pytest.raises(CORE.InputError, match=r"cross_attention-<step>\.pt"):
        run("DreamCacheLoadAdapters", adapters=only)


def test_a_file_is_listed_loaded_and_used(folder, models):
    adapters = make_adapters(models["sd15"])
    CORE.save_adapters(adapters, folder / "mine.safetensors")
    assert options() == ["mine.safetensors"]
    loaded = run("DreamCacheLoadAdapters", adapters="mine.safetensors")[0]
    model, reference = models["sd15"], encode(models["sd15"])
    assert torch.equal(
        sample(apply(model, loaded, reference)), sample(apply(model, adapters, reference))
    )


def test_saved_references_are_not_listed_among_the_adapters(folder, models):
    (folder / "references").mkdir(exist_ok=True)
    encode(models["sd15"]).save(folder / "references" / "dog.safetensors")
    CORE.save_adapters(make_adapters(models["sd15"]), folder / "mine.safetensors")
    assert options() == ["mine.safetensors"]


def test_a_changed_file_changes_the_fingerprint(folder, models):
    node = comfy_nodes.NODE_CLASS_MAPPINGS["DreamCacheLoadAdapters"]
    CORE.save_adapters(make_adapters(models["sd15"]), folder / "mine.safetensors")
    before = node.fingerprint_inputs(adapters="mine.safetensors")
    assert node.fingerprint_inputs(adapters="mine.safetensors") == before
    CORE.save_adapters(make_adapters(models["sd21"]), folder / "mine.safetensors")
    assert node.fingerprint_inputs(adapters="mine.safetensors") != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS"),
        (b"", "empty"),
        (b"PK\x03\x04 torn", "complete torch file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "complete safetensors"),
    ],
    ids=["html", "lfs", "zero bytes", "truncated pt", "truncated safetensors"],
)
def test_a_damaged_file_is_named_for_what_it_is(folder, content, message):
    (folder / "bad.safetensors").write_bytes(content)
    with pytest.raises(CORE.FileFormatError, match=message):
        run("DreamCacheLoadAdapters", adapters="bad.safetensors")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "base model"),
        ("lora_unet_mid_block.lora_up.weight", "LoRA"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("control_model.zero_convs.0.0.weight", "ControlNet"),
    ],
)
def test_other_weights_are_named_for_what_they_are(folder, key, message):
    save_file({key: torch.zeros(2, 2)}, folder / "other.safetensors")
    with pytest.raises(CORE.FileFormatError, match=message):
        run("DreamCacheLoadAdapters", adapters="other.safetensors")


@pytest.mark.parametrize(
    ("adapters_of", "model_of"),
    [("sdxl", "sd15"), ("sd15", "sdxl"), ("sd21", "sd15"), ("sd15", "sd21")],
)
def test_adapters_of_another_family_are_refused_with_both_names(models, adapters_of, model_of):
    reference = encode(models[model_of])
    with pytest.raises(CORE.MismatchError) as caught:
        apply(models[model_of], make_adapters(models[adapters_of]), reference)
    assert str(caught.value).startswith(
        f"This model is {NAMES[model_of]}, the adapters are for {NAMES[adapters_of]}. "
    )
    assert "block" not in str(caught.value)


def test_adapters_and_reference_of_different_layer_lists_are_refused(models):
    model = models["sd15"]
    adapters = make_adapters(model, layers=["middle_block.1", "output_blocks.4.1"])
    with pytest.raises(CORE.MismatchError, match=r"reference.*adapters"):
        apply(model, adapters, encode(model))


def test_a_transformer_model_is_refused(models):
    model = models["sd15"].clone()
    model.model = type(
        "Flux", (), {"diffusion_model": torch.nn.Linear(2, 2), "current_patcher": None}
    )()
    with pytest.raises(CORE.UnsupportedModelError, match=r"Flux.*Stable Diffusion"):
        apply(model, make_adapters(models["sd15"]), encode(models["sd15"]))


def test_a_video_unet_is_refused():
    video = make_model(
        "sd15",
        use_temporal_attention=True,
        use_temporal_resblock=True,
        video_kernel_size=[3, 1, 1],
        extra_ff_mix_layer=True,
        use_spatial_context=True,
        merge_strategy="learned_with_images",
        merge_factor=0.0,
    )
    with pytest.raises(CORE.UnsupportedModelError, match="video"):
        make_adapters(video)


def test_a_v_prediction_model_under_epsilon_adapters_is_a_warning(models, caplog):
    model = advanced.ModelSamplingDiscrete().patch(models["sd21"], "v_prediction", False)[0]
    with caplog.at_level(logging.WARNING):
        shown = said_by_apply(model, make_adapters(models["sd21"]), encode(models["sd21"]))
    assert "v2-1_512" in caplog.text
    assert "v2-1_512" in shown, "stands on the node too"
    caplog.clear()
    shown = said_by_apply(models["sd21"])
    assert not caplog.text
    assert shown == "subject 1, three predictions a step"
    shown = said_by_apply(apply(models["sd21"], image_guidance=1.0), image_guidance=1.0, scale=0)
    assert shown == (
        "subject 2 of 2, all everywhere (a region for each keeps them apart), two predictions a step, but its strength is 0: "
        "it does not appear"
    )


def test_what_weakens_a_likeness_stands_on_the_node(models, caplog):
    with caplog.at_level(logging.WARNING):
        adapters = make_adapters(models["sd21"])
        adapters.info = replace(adapters.info, timestep=300)
        shown = said_by_apply(models["sd21"], adapters, encode(models["sd21"]))
    assert "encoded at timestep 1, the adapters are for timestep 300" in shown
    assert caplog.text.count("encoded at timestep 1") == 1
    assert "broken colours" in said_by_apply(models["sd21"], image_guidance=20.0)


def test_the_guider_without_an_applied_reference_says_what_to_connect(models):
    with pytest.raises(CORE.StateError, match="Apply DreamCache"):
        run("DreamCacheGuider", model=models["sd15"], positive=[], negative=[])


def test_settings_out_of_range_are_refused(models):
    model = models["sd15"]
    for inputs in (
        {"scale": float("nan")},
        {"image_guidance": float("inf")},
        {"guidance": "other"},
    ):
        with pytest.raises(CORE.InputError):
            apply(model, **inputs)
