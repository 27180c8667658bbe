"""The nodes that prepare, encode, combine, save and load references."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    CORE,
    CallCounter,
    FlatVAE,
    apply,
    encode,
    execute,
    make_adapters,
    make_image,
    make_model,
    make_text,
    run,
    run_options,
    said,
    sample,
)

SUBJECT = torch.zeros(1, 128, 128)
SUBJECT[:, 32:96, 32:96] = 1


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return make_model("sd15")


def equal(a, b):
    same = a.layers == b.layers and all(torch.equal(a.features[n], b.features[n]) for n in a.layers)
    return same and (a.timestep, a.latent_size, a.seed) == (b.timestep, b.latent_size, b.seed)


def test_the_same_seed_gives_the_same_reference_whatever_is_encoded_with_it(model):
    one, other = make_image(1), make_image(2)
    alone = encode(model, image=one)
    together = encode(model, image=torch.cat([other, one, other]))
    assert together.num_references == 3
    for layer in alone.layers:
        assert torch.equal(together.features[layer][1:2], alone.features[layer])
    assert equal(encode(model, image=one), alone)
    assert not equal(
        run(
            "DreamCacheEncode",
            model=model,
            vae=FlatVAE(),
            image=one,
            conditioning=make_text(model, 100),
            seed=1,
        )[0],
        alone,
    )


def test_encoding_leaves_the_global_random_state_alone(model):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    encode(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_encoding_uses_one_row_per_reference_and_leaves_no_hook(model):
    with CallCounter(model) as counter:
        encode(model, image=make_image(0, batch=3))
    assert counter.rows == [1, 1, 1]
    modules = model.model.diffusion_model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_encoding_with_an_applied_model_equals_encoding_with_the_plain_one(model):
    assert equal(encode(apply(model)), encode(model))


def test_encoding_ignores_another_sampling_on_the_model(model):
    import comfy_extras.nodes_model_advanced as advanced

    lcm = advanced.ModelSamplingDiscrete().patch(model, "lcm", False)[0]
    assert equal(encode(lcm), encode(model))


def test_encoding_sees_the_loras_of_the_model(model):
    patched = model.clone()
    name = "diffusion_model.middle_block.0.in_layers.2.weight"
    weight = model.model.diffusion_model.middle_block[0].in_layers[2].weight
    patched.add_patches({name: (torch.ones_like(weight),)}, 0.1)
    assert not equal(encode(patched), encode(model))
    assert equal(encode(model), encode(model))


class Clip:
    """A CLIP whose every text is the one that ``encode`` uses, and that keeps what it was asked."""

    def __init__(self, model):
        self.model, self.asked = model, []

    def tokenize(self, text):
        self.asked.append(text)
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return make_text(self.model, 100)


def test_clip_encodes_the_empty_prompt(model):
    clip = Clip(model)
    ours = run("DreamCacheEncode", model=model, vae=FlatVAE(), image=make_image(0), clip=clip)[0]
    assert clip.asked == [""]
    assert equal(ours, encode(model))


def test_conditioning_overrides_clip(model):
    ours = run(
        "DreamCacheEncode",
        model=model,
        vae=FlatVAE(),
        image=make_image(0),
        clip=object(),
        conditioning=make_text(model, 100),
    )[0]
    assert equal(ours, encode(model))


def test_encode_without_clip_or_conditioning_says_what_to_connect(model):
    with pytest.raises(CORE.InputError, match="clip"):
        run("DreamCacheEncode", model=model, vae=FlatVAE(), image=make_image(0))


def test_images_that_are_no_multiple_of_eight_are_cropped_in_the_middle(model):
    image = make_image(0, 131, 147)
    assert equal(encode(model, image=image), encode(model, image=image[:, 1:129, 1:145]))


def test_a_mask_keeps_only_the_subjects_tokens(model):
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    masked = encode(model, mask=mask)
    for layer, tokens in masked.masks.items():
        width = tokens.shape[-1]
        assert tokens[..., : width // 2].all(), layer
        assert not tokens[..., (width + 1) // 2 :].any(), layer
    adapters = make_adapters(model)
    assert not torch.equal(
        sample(apply(model, adapters, masked)), sample(apply(model, adapters, encode(model)))
    )


def test_a_mask_of_ones_equals_no_mask(model):
    adapters = make_adapters(model)
    masked = encode(model, mask=torch.ones(1, 256, 256))
    assert torch.equal(
        sample(apply(model, adapters, masked)), sample(apply(model, adapters, encode(model)))
    )


def test_load_images_placeholder_mask_counts_as_no_mask(model):
    assert encode(model, mask=torch.zeros(1, 64, 64)).masks is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 128, 256), "128"),
        (torch.zeros(1, 128, 128), "empty"),
        (torch.ones(3, 128, 128), "one mask"),
    ],
    ids=["another aspect", "empty", "three for one image"],
)
def test_masks_that_do_not_fit_are_refused(model, mask, message):
    with pytest.raises(CORE.InputError, match=message):
        encode(model, mask=mask, mask_marks="subject")


@pytest.mark.parametrize("node_id", ["DreamCacheReferenceImage", "DreamCacheEncode"])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (None, "no mask: the background is in the reference"),
        (
            torch.zeros(1, 64, 64),
            "nothing is painted in the mask: the background is in the reference",
        ),
        (torch.zeros(1, 128, 128), "the mask is empty: the background is in the reference"),
        (SUBJECT, "subject covers 25 %"),
        (1 - SUBJECT, "the mask was turned round, subject covers 25 %"),
    ],
    ids=["none", "placeholder", "empty", "subject", "background"],
)
def test_a_node_says_what_it_made_of_the_mask(model, node_id, mask, words):
    inputs = {"image": make_image(0), "mask": mask}
    if node_id == "DreamCacheEncode":
        inputs |= {"model": model, "vae": FlatVAE(), "conditioning": make_text(model, 100)}
    assert said(node_id, **inputs).startswith(words)


def test_encode_turns_a_mask_of_the_background_round(model):
    masked = encode(model, mask=1 - SUBJECT)
    expected = encode(model, mask=SUBJECT)
    assert all(torch.equal(masked.masks[layer], expected.masks[layer]) for layer in masked.layers)
    forced = encode(model, mask=1 - SUBJECT, mask_marks="subject")
    assert not torch.equal(forced.masks[masked.layers[-1]], masked.masks[masked.layers[-1]])


def test_an_image_with_alpha_is_encoded_as_its_cut_out_on_white(model):
    image, alpha = make_image(1), SUBJECT[..., None]
    transparent = encode(model, image=torch.cat([image, alpha], dim=-1))
    on_white = encode(model, image=image * alpha + 1 - alpha, mask=SUBJECT)
    assert equal(transparent, on_white)
    assert all(torch.equal(transparent.masks[n], on_white.masks[n]) for n in on_white.layers)


def test_an_image_that_is_all_transparent_is_refused(model):
    with pytest.raises(CORE.InputError, match="empty"):
        encode(model, image=torch.zeros(1, 128, 128, 4))


@pytest.mark.parametrize("size", [(1, 1), (6000, 6000), (32, 512)])
def test_images_of_extreme_size_are_refused_with_advice(model, size):
    with pytest.raises(CORE.InputError, match="Prepare Reference Image"):
        encode(model, image=torch.zeros(1, *size, 3))


def test_a_vae_of_another_model_is_refused(model):
    class OtherVAE(FlatVAE):
        def encode(self, pixels):
            return super().encode(pixels).repeat(1, 4, 1, 1)

    with pytest.raises(CORE.InputError, match="VAE"):
        run(
            "DreamCacheEncode",
            model=model,
            vae=OtherVAE(),
            image=make_image(0),
            conditioning=make_text(model, 1),
        )


def test_prepare_puts_the_subject_on_white_and_previews_it():
    image, mask = torch.zeros(1, 90, 60, 3), torch.zeros(1, 90, 60)
    mask[:, 30:60, 20:40] = 1
    prepared, subject = run("DreamCacheReferenceImage", image=image, mask=mask, size=128)
    assert prepared.shape == (1, 128, 128, 3)
    assert prepared[0, 0, 0].tolist() == [1, 1, 1]
    rows = subject[0].amax(dim=1).nonzero().flatten()
    assert abs(len(rows) - 0.85 * 128) <= 1


def test_prepare_takes_load_images_alpha_as_the_background():
    image, alpha_mask = torch.zeros(1, 90, 90, 3), torch.ones(1, 90, 90)
    alpha_mask[:, 30:60, 30:60] = 0
    _, marked_background = run(
        "DreamCacheReferenceImage", image=image, mask=alpha_mask, mask_marks="background", size=128
    )
    _, by_itself = run("DreamCacheReferenceImage", image=image, mask=alpha_mask, size=128)
    assert torch.equal(by_itself, marked_background)
    _, marked_subject = run("DreamCacheReferenceImage", image=image, mask=1 - alpha_mask, size=128)
    assert torch.equal(marked_background, marked_subject)


@pytest.mark.parametrize("marks", ["subject", "background"])
def test_prepare_takes_the_placeholder_mask_as_none(marks):
    image = make_image(0, 100, 150)
    theirs = run("DreamCacheReferenceImage", image=image)
    ours = run(
        "DreamCacheReferenceImage", image=image, mask=torch.zeros(1, 64, 64), mask_marks=marks
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_prepare_refuses_what_it_cannot_use():
    image = make_image(0, 100, 150)
    for mask, marks, message in (
        (torch.zeros(1, 100, 150), "subject", "empty"),
        (torch.ones(1, 100, 150), "background", "empty"),
        (torch.ones(1, 150, 100), "subject", "150"),
    ):
        with pytest.raises(CORE.InputError, match=message):
            run("DreamCacheReferenceImage", image=image, mask=mask, mask_marks=marks)
    with pytest.raises(CORE.InputError):
        run("DreamCacheReferenceImage", image=torch.zeros(1, 1, 1, 3))


def test_prepare_shrinks_an_image_of_6000_pixels():
    prepared, _ = run("DreamCacheReferenceImage", image=torch.zeros(1, 6000, 6000, 3))
    assert prepared.shape == (1, 512, 512, 3)


@pytest.mark.parametrize(("kind", "side"), [("sd15", 512), ("sdxl", 1024)])
def test_size_0_is_the_models_own(kind, side):
    image = make_image(0)
    prepared, _ = run("DreamCacheReferenceImage", image=image, size=0, model=make_model(kind))
    assert prepared.shape == (1, side, side, 3)
    with pytest.raises(CORE.InputError, match="no model is connected"):
        run("DreamCacheReferenceImage", image=image, size=0)


def test_combined_references_are_in_the_order_of_the_inputs(model):
    a, b, c = (encode(model, seed=i) for i in range(3))
    combined = run("DreamCacheCombineReferences", reference_1=a, reference_2=b, reference_8=c)[0]
    for layer in a.layers:
        assert torch.equal(
            combined.features[layer], torch.cat([x.features[layer] for x in (a, b, c)])
        )


def test_references_of_two_sizes_do_not_combine(model):
    with pytest.raises(CORE.MismatchError, match=r"128 x 128.*128 x 192"):
        run(
            "DreamCacheCombineReferences",
            reference_1=encode(model),
            reference_2=encode(model, image=make_image(0, 192, 128)),
        )


def test_a_saved_reference_is_listed_and_loads_equal(model):
    reference = encode(model)
    run("DreamCacheSaveReference", reference=reference, filename_prefix="dreamcache/my_dog")
    run("DreamCacheSaveReference", reference=reference, filename_prefix="dreamcache/my_dog")
    node = __import__("nodes").NODE_CLASS_MAPPINGS["DreamCacheLoadReference"]
    options = node.define_schema().inputs[0].options
    mine = [o for o in options if "my_dog" in o]
    assert len(mine) == 2
    for option in mine:
        assert option.endswith("[output]")
        assert equal(run("DreamCacheLoadReference", reference=option)[0], reference)


def test_a_loaded_reference_shows_its_images(model):
    images = torch.cat([make_image(0), make_image(1)])
    reference = encode(model, image=images)
    run("DreamCacheSaveReference", reference=reference, filename_prefix="dreamcache/seen")
    (name,) = (o for o in run_options("DreamCacheLoadReference") if "seen" in o)
    (shown,) = execute("DreamCacheLoadReference", reference=name).ui["images"]
    folder = Path(folder_paths.get_temp_directory(), shown["subfolder"])
    with Image.open(folder / shown["filename"]) as preview:
        assert preview.size == (2 * 128, 128)
        seen = torch.tensor(np.asarray(preview)).float() / 255
    assert (seen[:, :128] - images[0]).abs().mean() < 0.1 < (seen[:, 128:] - images[0]).abs().mean()


def test_saving_where_the_list_does_not_look_is_said(model):
    said = {
        prefix: execute("DreamCacheSaveReference", reference=encode(model), filename_prefix=prefix)
        .ui.as_dict()["text"][0]
        .startswith("Load Reference does not list this folder")
        for prefix in ("cat", "dreamcache/cats/cat", "cats/cat")
    }
    assert said == {"cat": False, "dreamcache/cats/cat": False, "cats/cat": True}


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 0.0), ("float16", 4e-4), ("bfloat16", 3e-3)]
)
def test_a_reference_is_saved_in_another_float_type_and_the_loss_is_said(model, dtype, most):
    reference = encode(model)
    node = __import__("nodes").NODE_CLASS_MAPPINGS["DreamCacheSaveReference"]
    prefix = f"dreamcache/as_{dtype}"
    text = node.execute(reference, prefix, dtype).ui.as_dict()["text"][0]
    (name,) = (o for o in run_options("DreamCacheLoadReference") if f"as_{dtype}" in o)
    loaded = run("DreamCacheLoadReference", reference=name)[0]
    layer = reference.layers[0]
    assert loaded.features[layer].dtype == getattr(torch, dtype)
    error = float(text.split("rounding error ")[1].split()[0])
    assert error == pytest.approx(reference.rounding_error(getattr(torch, dtype)), rel=0.05)
    assert error <= most
    assert (error > 0) == (dtype != "float32")


def test_features_beyond_float16_are_not_saved_as_it(model):
    reference = encode(model)
    beyond = {name: 1e6 * feature for name, feature in reference.features.items()}
    with pytest.raises(CORE.InputError, match="beyond the range of float16"):
        run(
            "DreamCacheSaveReference",
            reference=dataclasses.replace(reference, features=beyond),
            filename_prefix="dreamcache/beyond",
            dtype="float16",
        )
    assert not list(Path(folder_paths.get_output_directory()).rglob("beyond*"))


@pytest.fixture
def image_folder():
    """Two cut-out images and a file that is none, below ComfyUI's input folder."""
    folder = Path(folder_paths.get_input_directory()) / "subjects" / "toys"
    folder.mkdir(parents=True)
    for seed, name in enumerate(("b.png", "a.PNG")):
        pixels = np.full((80, 60, 4), 90 * (seed + 1), dtype=np.uint8)
        pixels[:20, :, 3] = 0
        Image.fromarray(pixels).save(folder / name, format="png")
    (folder / "notes.txt").write_text("no image")
    yield "subjects/toys"
    shutil.rmtree(folder.parent)


def test_a_folder_gives_a_reference_for_each_image_as_the_single_nodes_do(model, image_folder):
    assert image_folder in run_options("DreamCacheEncodeFolder", "folder")
    inputs = {"model": model, "vae": FlatVAE(), "clip": Clip(model), "size": 64}
    with CallCounter(model) as counter:
        references, names = run("DreamCacheEncodeFolder", folder=image_folder, **inputs)
    assert counter.rows == [1, 1]
    assert names == ["a", "b"]
    for reference, file in zip(references, ("a.PNG", "b.png"), strict=True):
        path = Path(folder_paths.get_input_directory()) / image_folder / file
        pixels = torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32) / 255)[None]
        image, _ = run("DreamCacheReferenceImage", image=pixels, size=64)
        assert equal(reference, encode(model, image=image))


def test_a_folder_is_prepared_at_the_models_own_size(model, image_folder):
    inputs = {"model": model, "vae": FlatVAE(), "clip": Clip(model)}
    (reference, _), _ = run("DreamCacheEncodeFolder", folder=image_folder, **inputs)
    assert reference.latent_size == (64, 64)


def test_a_folder_of_one_subject_gives_one_reference(model, image_folder):
    inputs = {"model": model, "vae": FlatVAE(), "clip": Clip(model), "size": 64}
    (reference,), names = run(
        "DreamCacheEncodeFolder", folder=image_folder, one_subject=True, **inputs
    )
    assert reference.num_references == 2
    assert names == ["toys"]
    apart, _ = run("DreamCacheEncodeFolder", folder=image_folder, **inputs)
    assert equal(CORE.ReferenceCache.concatenate(apart), reference)


def test_a_folder_names_the_images_that_show_their_background(model, image_folder):
    inputs = {"model": model, "vae": FlatVAE(), "clip": Clip(model), "size": 64}
    before = said("DreamCacheEncodeFolder", folder=image_folder, **inputs)
    assert "background" not in before
    path = Path(folder_paths.get_input_directory()) / image_folder
    photo = (make_image(0)[0] * 255).byte().numpy()
    for name, pixels in (("photo.png", photo), ("studio.png", photo * 0 + 250)):
        Image.fromarray(pixels).save(path / name)
    assert said("DreamCacheEncodeFolder", folder=image_folder, **inputs).startswith(
        "1 of 4 images show their background, which is then in the reference (photo.png);"
    )


def test_a_folder_shows_each_prepared_image_while_it_runs(model, image_folder, monkeypatch):
    shown = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, image, **_: shown.append((value, total, image)),
    )
    inputs = {"model": model, "vae": FlatVAE(), "clip": Clip(model), "size": 64}
    run("DreamCacheEncodeFolder", folder=image_folder, **inputs)
    steps = [(value, total) for value, total, _ in shown]
    assert (steps[:2], steps[-1]) == (
        [(1, 4), (2, 4)],
        (4, 4),
    )  # the host may leave out what follows fast
    assert [image[1].size for _, _, image in shown[:2]] == [(64, 64)] * 2


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a mapped file be written to")
def test_the_references_of_a_folder_wait_on_the_disk(model, image_folder):
    inputs = {"model": model, "vae": FlatVAE(), "clip": Clip(model), "size": 64}
    references, _ = run("DreamCacheEncodeFolder", folder=image_folder, **inputs)
    files = list(Path(folder_paths.get_temp_directory()).glob("dreamcache-*.safetensors"))
    for file in files:
        with file.open("r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(b"\0\0\x80\x3f")  # 1.0, where the last feature stands
    for reference in references:
        assert 1.0 in [float(feature.flatten()[-1]) for feature in reference.features.values()]


def test_a_changed_image_runs_the_folder_again(image_folder):
    node = __import__("nodes").NODE_CLASS_MAPPINGS["DreamCacheEncodeFolder"]
    before = node.fingerprint_inputs(folder=image_folder, size=64)
    assert node.fingerprint_inputs(folder=image_folder, size=64) == before
    path = Path(folder_paths.get_input_directory()) / image_folder / "b.png"
    Image.new("RGB", (9, 9)).save(path)
    assert node.fingerprint_inputs(folder=image_folder, size=64) != before


@pytest.mark.parametrize("name", ["", "missing", "../../etc", "/etc"])
def test_a_folder_without_images_is_refused(model, name):
    with pytest.raises(CORE.InputError, match="There is no folder"):
        run("DreamCacheEncodeFolder", model=model, vae=FlatVAE(), clip=Clip(model), folder=name)


@pytest.mark.parametrize(
    "prefix", ["../outside", "a/../../outside", "/tmp/outside", "..\\..\\x/../../../y"]
)
def test_saving_outside_the_output_folder_is_refused(model, prefix):
    before = sorted(Path(folder_paths.get_output_directory()).parent.rglob("*"))
    with pytest.raises(CORE.InputError, match="output folder"):
        run("DreamCacheSaveReference", reference=encode(model), filename_prefix=prefix)
    assert sorted(Path(folder_paths.get_output_directory()).parent.rglob("*")) == before


def test_a_link_out_of_the_output_folder_is_refused_where_comfyui_refuses_it(
    model, tmp_path, monkeypatch
):
    output = tmp_path / "output"
    output.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (output / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(output))
    reference = encode(model)
    try:
        folder_paths.get_save_image_path("link/x", str(output))
        is_refused = False
    except Exception:
        is_refused = True
    if is_refused:
        with pytest.raises(CORE.InputError, match="'link' leads out of"):
            run("DreamCacheSaveReference", reference=reference, filename_prefix="link/x")
    else:
        run("DreamCacheSaveReference", reference=reference, filename_prefix="link/x")
    assert len(list((tmp_path / "elsewhere").iterdir())) == (not is_refused)


def test_a_name_that_is_too_long_is_said_to_be_so(model):
    with pytest.raises(CORE.InputError, match=r"too long\. Give a shorter name"):
        run("DreamCacheSaveReference", reference=encode(model), filename_prefix="x" * 300)


@pytest.mark.parametrize("prefix", ["", "  ", "..", "dogs/", "a\0b", "a\nb", "\x1b[2J"])
def test_saving_without_a_file_name_is_refused(model, prefix):
    with pytest.raises(CORE.InputError, match="saved by name"):
        run("DreamCacheSaveReference", reference=encode(model), filename_prefix=prefix)


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.safetensors [output]",
        "missing.safetensors [output]",
        "zzz",
        "/etc/hosts [input]",
    ],
)
def test_loading_what_is_not_listed_is_refused(name):
    with pytest.raises(CORE.InputError, match="saved reference"):
        run("DreamCacheLoadReference", reference=name)


def test_a_reference_of_another_model_is_refused_with_both_names(model):
    sd21 = make_model("sd21")
    with pytest.raises(
        CORE.MismatchError,
        match=r"reference was encoded with Stable Diffusion 2.1, the adapters are for .* 1.5",
    ):
        apply(model, make_adapters(model), encode(sd21))


def test_a_reference_stays_on_the_cpu_and_counts_its_bytes(model):
    reference = encode(model)
    total = sum(f.numel() * f.element_size() for f in reference.features.values())
    assert all(f.device.type == "cpu" for f in reference.features.values())
    assert reference.get_ram_usage() == total


def test_encode_says_what_it_made(model):
    inputs = {"model": model, "vae": FlatVAE(), "conditioning": make_text(model, 1)}
    text = said("DreamCacheEncode", image=make_image(0, 128, 192, batch=3), **inputs)
    assert text.endswith("; 3 images, 192 x 128, SD 1.5, 0.3 MB")


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("%date:yyyy-MM-dd%/dog", "2026-03-09/dog"),
        ("dog_%date:yy.M.d%_%date:hhmmss%", "dog_26.3.9_140507"),
        ("100%", "100%"),
    ],
)
def test_dates_in_a_file_name_are_filled_in(model, monkeypatch, prefix, name):
    now = time.struct_time((2026, 3, 9, 14, 5, 7, 0, 68, 0))
    monkeypatch.setattr(time, "localtime", lambda *_: now)
    text = said("DreamCacheSaveReference", reference=encode(model), filename_prefix=prefix)
    assert f"{name}_00001_.safetensors" in text.replace(os.sep, "/")


def test_photographs_in_grey_or_with_alpha_prepare_right():
    grey = torch.from_numpy(np.linspace(0, 1, 100 * 80, dtype=np.float32)).reshape(1, 100, 80, 1)
    prepared, _ = run("DreamCacheReferenceImage", image=grey, size=64)
    assert prepared.shape == (1, 64, 64, 3)
    alpha = torch.zeros(1, 80, 80, 1)
    alpha[:, 20:60, 20:60] = 1
    rgba = torch.cat([torch.zeros(1, 80, 80, 3), alpha], dim=-1)
    prepared, subject = run("DreamCacheReferenceImage", image=rgba, size=64)
    assert prepared[0, 0, 0].tolist() == [1, 1, 1]
    assert 0.6 < subject.mean() < 0.8
