"""From a model folder, an adapter file and a subject's image to images."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image
from tiny_diffusers import random_adapters
from tiny_pipeline import tiny_pipeline, tiny_sdxl_pipeline

from dreamcache_core import (
    DreamCachePipeline,
    FileFormatError,
    InputError,
    MismatchError,
    ReferenceUse,
    StateError,
    load_adapters,
    prepare_reference_image,
    save_adapters,
)
from dreamcache_core.images.files import read_image
from dreamcache_core.method.backends import layout_of
from dreamcache_core.pipeline.loading import choose_device, load_diffusers_pipeline, load_pipeline

pytestmark = pytest.mark.diffusers


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    pipeline = tiny_pipeline(folder)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(folder / "model")
    save_adapters(random_adapters(layout_of(pipeline.unet)), folder / "adapters.safetensors")
    dog = Image.new("RGBA", (90, 70), (0, 0, 0, 0))
    dog.paste((200, 120, 40, 255), (20, 20, 70, 50))
    dog.save(folder / "dog.png")
    dog.convert("RGB").save(folder / "opaque.png")
    dog.getchannel("A").save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def pipe(files):
    return DreamCachePipeline.from_files(
        files / "model", files / "adapters.safetensors", device="cpu"
    )


def features(use):
    return use.reference.features["middle_block.1"]


def test_a_reference_from_a_file_equals_the_same_from_tensors(files, pipe):
    image, alpha = read_image(files / "dog.png")
    prepared, _ = prepare_reference_image(image, alpha, size=64)
    expected = pipe.encode_reference(prepared)
    use = pipe.read_reference(files / "dog.png", scale=0.5)
    assert torch.equal(features(use), expected.features["middle_block.1"])
    assert (use.scale, use.adapters) == (0.5, pipe.adapters)
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    first, second = (
        pipe("a dog", each, generator=torch.Generator().manual_seed(1), **settings)
        for each in (use, ReferenceUse(expected, pipe.adapters, 0.5))
    )
    assert torch.equal(first, second)


def test_masks_and_several_files(files, pipe, caplog):
    alone = pipe.read_reference(files / "dog.png")
    masked = pipe.read_reference([files / "opaque.png"] * 2, [files / "mask.png"] * 2)
    assert torch.equal(features(masked), features(alone).expand(2, -1, -1, -1))
    assert not caplog.records
    pipe.read_reference(files / "opaque.png")
    assert "opaque.png: no mask" in caplog.text


def test_layers_and_timestep_are_the_adapters(files, pipe, tmp_path):
    adapters = random_adapters(pipe.layout)
    object.__setattr__(adapters.info, "timestep", 5)
    save_adapters(adapters, tmp_path / "a.safetensors")
    other = DreamCachePipeline(pipe.pipeline, load_adapters(tmp_path / "a.safetensors"))
    use = other.read_reference(files / "dog.png")
    assert use.reference.timestep == 5
    assert use.reference.layers == adapters.layers


@pytest.mark.parametrize(
    ("scheduler", "kind"), [("ddim", DDIMScheduler), ("model", EulerDiscreteScheduler)]
)
def test_the_scheduler_is_the_papers_or_the_models(files, scheduler, kind):
    pipe = DreamCachePipeline.from_files(
        files / "model", files / "adapters.safetensors", device="cpu", scheduler=scheduler
    )
    assert isinstance(pipe.pipeline.scheduler, kind)
    assert (pipe.device.type, pipe.dtype) == ("cpu", torch.float32)


def test_float_type_is_chosen_by_name(files):
    options = {"device": "cpu", "dtype": "bfloat16"}
    pipe = DreamCachePipeline.from_files(files / "model", files / "adapters.safetensors", **options)
    assert pipe.dtype == torch.bfloat16
    options["dtype"] = "float8"
    with pytest.raises(InputError, match="given 'float8'"):
        DreamCachePipeline.from_files(files / "model", files / "adapters.safetensors", **options)


def test_unknown_devices_are_refused():
    with pytest.raises(InputError, match="warp cannot be used"):
        choose_device("warp")


def test_adapters_of_another_model_are_refused(files, tmp_path):
    other = tiny_pipeline(tmp_path, context_width=48)
    save_adapters(random_adapters(layout_of(other.unet)), tmp_path / "a.safetensors")
    with pytest.raises(MismatchError, match="the adapters"):
        DreamCachePipeline.from_files(files / "model", tmp_path / "a.safetensors", device="cpu")


def test_masks_of_another_number_are_refused(files, pipe):
    with pytest.raises(InputError, match="a mask for each of the 1"):
        pipe.read_reference(files / "dog.png", [files / "mask.png"] * 2)


def test_without_adapters_the_error_names_from_files(files, pipe):
    with pytest.raises(StateError, match="from_files"):
        DreamCachePipeline(pipe.pipeline).read_reference(files / "dog.png")


def changed_model(model, folder, file, **values):
    """Copy a model's folder, with other settings in one of its files."""
    shutil.copytree(model, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("unet/config.json", "sample_size", "abc"),
        ("unet/config.json", "sample_size", 16.5),
        ("unet/config.json", "sample_size", None),
        ("unet/config.json", "sample_size", [8, 8, 8]),
        ("vae/config.json", "scaling_factor", "x"),
        ("vae/config.json", "scaling_factor", None),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "latents_mean", ["a", "b", "c", "d"]),
        ("vae/config.json", "latents_mean", [0.5]),
        ("vae/config.json", "latents_std", 2),
        ("vae/config.json", "latents_std", [1.0, 1.0, 1.0, 0.0]),
        ("scheduler/scheduler_config.json", "prediction_type", "foo"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("tokenizer/tokenizer_config.json", "model_max_length", 13),
        ("tokenizer/tokenizer_config.json", "model_max_length", 10**30),
    ],
)
def test_settings_with_which_no_image_can_be_made_are_named(files, tmp_path, file, name, value):
    model = changed_model(files / "model", tmp_path / "m", file, **{name: value})
    with pytest.raises(FileFormatError) as caught:
        load_pipeline(model, device="cpu")
    assert f"Expected {name} in {model / file} to be" in str(caught.value)
    assert f"got {value!r}. Mend the file" in str(caught.value)


def test_a_table_of_noise_levels_that_fills_the_memory_is_refused_before_it_is_made(
    files, tmp_path
):
    file = "scheduler/scheduler_config.json"
    model = changed_model(files / "model", tmp_path / "m", file, num_train_timesteps=10**12)
    with pytest.raises(
        FileFormatError, match=r"num_train_timesteps .* at most 100000, got .* 13 digits"
    ):
        load_pipeline(model, device="cpu")


def test_a_tokenizer_without_its_length_is_refused_also_as_the_second(tmp_path):
    tiny_sdxl_pipeline(tmp_path).save_pretrained(tmp_path / "sdxl")
    assert load_diffusers_pipeline(tmp_path / "sdxl")
    (tmp_path / "sdxl" / "tokenizer_2" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"tokenizer_2/tokenizer_config\.json"):
        load_diffusers_pipeline(tmp_path / "sdxl")
