"""The command line on tiny real models: images out, and one clear line for every bad input."""

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from golden import load_case
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_diffusers import golden_unet, random_adapters, random_unet
from tiny_pipeline import ddim, single_file_weights, tiny_pipeline, tiny_sdxl_pipeline, wrap

import dreamcache_core
from dreamcache_core import load_adapters, save_adapters
from dreamcache_core.cli.main import main
from dreamcache_core.images.files import read_image, save_png

pytestmark = pytest.mark.diffusers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of good files: two models, adapters for each, references, a saved reference."""
    folder = tmp_path_factory.mktemp("files")
    for name, make in (("sd", tiny_pipeline), ("xl", tiny_sdxl_pipeline)):
        pipe = wrap(make(folder))
        pipe.pipeline.save_pretrained(folder / name)
        save_adapters(random_adapters(pipe.layout), folder / f"{name}.safetensors")
        if name == "sd":
            pipe.encode_reference(torch.rand(2, 64, 64, 3), seed=5).save(folder / "ref.safetensors")
    image = torch.rand(1, 90, 70, 3)
    save_png(folder / "photo.png", image)
    save_png(folder / "other.png", image.flip(1))
    mask = torch.zeros(1, 90, 70, 3)
    mask[:, 20:70, 10:60] = 1
    save_png(folder / "mask.png", mask)
    with Image.open(folder / "photo.png") as opened, Image.open(folder / "mask.png") as alpha:
        opened.putalpha(alpha.convert("L"))
        opened.save(folder / "cutout.png")
    torch.save(load_case("sd21_tiny").adapter_weights, folder / "released.pt")
    return folder


def arguments(files, out, **options):
    settings = {
        "model": files / "sd",
        "adapters": files / "sd.safetensors",
        "reference": files / "photo.png",
        "prompt": "a cat",
        "steps": 2,
        "size": 64,
        "device": "cpu",
        "out": out,
        **options,
    }
    words = ["generate"]
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        for one in values:
            words += [f"--{key.replace('_', '-')}", str(one)]
    return words


def text_of(path):
    with Image.open(path) as image:
        return json.loads(image.text["dreamcache"])


def test_generate_writes_images_reference_and_contact_sheet(files, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert main(arguments(files, out, count=2, seed=7, negative="bad")) == 0
    names = ["0001_reference.png", "0001_seed_7.png", "0001_seed_8.png", "0001_sheet.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert read_image(out / "0001_seed_7.png")[0].shape == (1, 64, 64, 3)
    assert read_image(out / "0001_sheet.png")[0].shape[2] == 2 * 256
    captured = capsys.readouterr()
    assert all(name in captured.out for name in names)
    assert captured.err.count("background will leak") == 1
    assert "sampling" in captured.err


def test_text_chunk_holds_all_parameters_and_no_folder(files, tmp_path):
    options = {"seed": 7, "negative": "bad", "image_guidance": 2.5, "cfg": 3.0, "scale": 0.9}
    assert main(arguments(files, tmp_path, **options)) == 0
    text = text_of(tmp_path / "0001_seed_7.png")
    expected = {
        **options,
        "prompt": "a cat",
        "steps": 2,
        "size": 64,
        "fill": 0.85,
        "guidance": "separate",
        "scheduler": "ddim",
        "model": "sd",
        "adapters": "sd.safetensors",
        "reference": ["photo.png"],
    }
    assert expected.items() <= text.items()
    assert text["versions"]["dreamcache"] == dreamcache_core.__version__
    assert {"torch", "diffusers"} <= set(text["versions"])
    assert str(files) not in json.dumps(text)


def test_same_seed_same_image_whatever_the_count_and_nothing_is_overwritten(files, tmp_path):
    assert main(arguments(files, tmp_path, count=2, seed=7)) == 0
    assert main(arguments(files, tmp_path, seed=8)) == 0
    first, again = (read_image(tmp_path / f"000{n}_seed_8.png")[0] for n in (1, 2))
    torch.testing.assert_close(first, again, atol=1.01 / 255, rtol=0)  # one grey level: rounding
    assert not torch.equal(first, read_image(tmp_path / "0001_seed_7.png")[0])


def test_alpha_is_the_mask_and_an_explicit_mask_gives_the_same(files, tmp_path, capsys):
    cutout = arguments(files, tmp_path / "a", reference=files / "cutout.png")
    masked = arguments(files, tmp_path / "b", mask=files / "mask.png")
    assert main(cutout) == 0
    assert main(masked) == 0
    assert "leak" not in capsys.readouterr().err
    first, second = (read_image(tmp_path / d / "0001_reference.png")[0] for d in "ab")
    torch.testing.assert_close(first, second, atol=0.01, rtol=0)
    assert (first[:, 0] == 1).all()


def test_several_images_are_one_subject(files, tmp_path):
    both = [files / "photo.png", files / "other.png"]
    assert main(arguments(files, tmp_path, reference=both)) == 0
    assert (tmp_path / "0001_reference_2.png").exists()


def test_sdxl_at_its_own_size_with_joint_guidance(files, tmp_path):
    words = arguments(
        files, tmp_path, model=files / "xl", adapters=files / "xl.safetensors", guidance="joint"
    )
    size = words.index("--size")
    assert main(words[:size] + words[size + 2 :]) == 0
    assert read_image(tmp_path / "0001_seed_0.png")[0].shape == (1, 128, 128, 3)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_file_with_config_gives_the_folders_images(suffix, files, tmp_path):
    case = load_case("sd15_tiny")
    pipe = tiny_pipeline(tmp_path, case.context_width, golden_unet(case))
    pipe.save_pretrained(tmp_path / "folder")
    weights = single_file_weights(pipe, case.unet_weights)
    single = tmp_path / f"single.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": weights}, single)
    else:
        save_file({key: value.contiguous() for key, value in weights.items()}, single)
    config = tmp_path / "config"
    heavy = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tmp_path / "folder", config, ignore=heavy)
    torch.save(case.adapter_weights, tmp_path / "released.pt")
    adapters = ["convert", str(tmp_path / "released.pt"), str(tmp_path / "own.safetensors")]
    assert main([*adapters, "--family", case.family]) == 0
    common = {"adapters": tmp_path / "own.safetensors"}
    assert main(arguments(files, tmp_path / "a", model=tmp_path / "folder", **common)) == 0
    assert main(arguments(files, tmp_path / "b", model=single, config=config, **common)) == 0
    first, second = (read_image(tmp_path / d / "0001_seed_0.png")[0] for d in "ab")
    torch.testing.assert_close(first, second, atol=1.01 / 255, rtol=0)  # one grey level: rounding
    assert text_of(tmp_path / "b" / "0001_seed_0.png")["config"] == "config"


@pytest.mark.slow
def test_python_m_runs_from_the_shell(files, tmp_path):
    words = [sys.executable, "-m", "dreamcache_core", *arguments(files, tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip() and "sampling" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: photo.png")


def test_v_prediction_model_is_a_warning(files, tmp_path, capsys):
    shutil.copytree(files / "sd", tmp_path / "v")
    ddim(prediction_type="v_prediction").save_pretrained(tmp_path / "v" / "scheduler")
    assert main(arguments(files, tmp_path / "out", model=tmp_path / "v", count=2)) == 0
    assert capsys.readouterr().err.count("warning: This model predicts v_prediction") == 1


# --- adapters from the model itself


def test_without_a_file_adapters_are_fitted_and_it_is_said(files, tmp_path, capsys):
    cutout = files / "cutout.png"
    assert main(arguments(files, tmp_path / "a", adapters=[], reference=cutout)) == 0
    err = capsys.readouterr().err
    assert "fitted to the model, not trained" in err
    assert "timestep" not in err  # the reference is cached at theirs
    assert text_of(tmp_path / "a" / "0001_seed_0.png")["adapters"] is None
    target = tmp_path / "fitted.safetensors"
    assert main(["fit", f"--model={files / 'sd'}", f"--out={target}", "--device=cpu"]) == 0
    assert str(target) in capsys.readouterr().out
    assert main(arguments(files, tmp_path / "b", adapters=target, reference=cutout)) == 0
    assert "warning" not in capsys.readouterr().err
    first, second = (read_image(tmp_path / d / "0001_seed_0.png")[0] for d in "ab")
    assert torch.equal(first, second)
    assert main(["inspect", str(target)]) == 0
    assert "fitted" in capsys.readouterr().out
    assert load_adapters(target).info.base_model == "sd"


def test_fitted_adapters_on_another_checkpoint_are_a_warning(files, tmp_path, capsys):
    target = tmp_path / "fitted.safetensors"
    assert main(["fit", f"--model={files / 'sd'}", f"--out={target}", "--device=cpu"]) == 0
    other = tmp_path / "other"
    shutil.copytree(files / "sd", other)
    random_unet(64, seed=9, sample_size=8).save_pretrained(other / "unet")
    capsys.readouterr()
    assert main(arguments(files, tmp_path / "out", model=other, adapters=target)) == 0
    assert capsys.readouterr().err.count("fitted to another model (sd)") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "{t}/a.pt"}, ".safetensors"),
        ({"out": "{f}/sd.safetensors"}, "--force"),
        ({"out": "{t}/none/a.safetensors"}, "no folder"),
        ({"size": 60}, "multiple of 8"),
        ({"seed": -1}, "seed"),
        ({"model": "{t}/nowhere"}, "Nothing is downloaded"),
    ],
    ids=str,
)
def test_fit_refuses_bad_input_and_writes_nothing(change, message, files, tmp_path, capsys):
    given = {"model": "{f}/sd", "out": "{t}/a.safetensors", "device": "cpu", **change}
    words = [f"--{k}={str(v).format(f=files, t=tmp_path)}" for k, v in given.items()]
    before = (files / "sd.safetensors").read_bytes()
    assert main(["fit", *words]) != 0
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
    assert (files / "sd.safetensors").read_bytes() == before


# --- bad input


def png_header(path, width, height):
    """A PNG whose header states a size, without the pixels."""
    chunks = b""
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
    ):
        check = struct.pack(">I", zlib.crc32(name + data))
        chunks += struct.pack(">I", len(data)) + name + data + check
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


BAD = {
    "no adapters": ({"adapters": "{t}/none.safetensors"}, "none.safetensors"),
    "html adapters": ({"adapters": "{t}/page.pt"}, "web page"),
    "truncated adapters": ({"adapters": "{t}/cut.safetensors"}, "complete"),
    "a reference as adapters": ({"adapters": "{f}/ref.safetensors"}, "reference/1"),
    "a base model as adapters": (
        {"adapters": "{f}/sd/unet/diffusion_pytorch_model.safetensors"},
        "base model",
    ),
    "another family": ({"adapters": "{f}/xl.safetensors"}, "SDXL"),
    "no image": ({"reference": "{t}/none.png"}, "none.png"),
    "an image that is a page": ({"reference": "{t}/page.pt"}, "web page"),
    "a huge image": ({"reference": "{t}/huge.png"}, "100 megapixels"),
    "a tiny image": ({"reference": "{t}/tiny.png"}, "1 x 1"),
    "an empty mask": ({"mask": "{t}/black.png"}, "mask"),
    "a mask of another aspect": ({"mask": "{t}/wide.png"}, "aspect"),
    "no mask file": ({"mask": "{t}/none.png"}, "none.png"),
    "too many masks": ({"mask": ["{f}/mask.png"] * 2}, "2 masks and 1 references"),
    "no model": ({"model": "{t}/nowhere"}, "Nothing is downloaded"),
    "not a model folder": ({"model": "{t}"}, "model_index.json"),
    "a transformer": ({"model": "{t}/flux"}, "FluxPipeline"),
    "damaged model": ({"model": "{t}/damaged"}, "could not be loaded"),
    "single file without --config": ({"model": "{t}/single.safetensors"}, "--config"),
    "a LoRA as single file": (
        {"model": "{t}/lora.safetensors", "config": "{f}/sd"},
        "could not be loaded",
    ),
    "--config that is none": (
        {"model": "{t}/single.safetensors", "config": "{t}/none"},
        "local diffusers folder",
    ),
    "out is a file": ({"out": "{t}/page.pt"}, "a file"),
    "out is below a file": ({"out": "{t}/page.pt/deep/out"}, "a file"),
    "an image as adapters": ({"adapters": "{t}/tiny.png"}, "an image or a document"),
    "--config with a folder": ({"config": "{f}/sd"}, "--config goes with a single-file"),
    "size 0": ({"size": 0}, "multiple of 8"),
    "too many steps": ({"steps": 2000}, "1 ... 1000"),
    "odd size": ({"size": 65}, "multiple of 8"),
    "no steps": ({"steps": 0}, "--steps"),
    "no finite cfg": ({"cfg": "nan"}, "--cfg"),
    "no finite guidance": ({"image_guidance": "inf"}, "image_guidance"),
    "negative seed": ({"seed": -1}, "--seed"),
    "unknown device": ({"device": "warp"}, "--device warp"),
    "bad fill": ({"fill": 2}, "fill"),
}


@pytest.fixture
def bad_files(files, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "page.pt").write_text("<!DOCTYPE html><html></html>")
    data = (files / "sd.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    png_header(folder / "huge.png", 20_000, 20_000)
    save_png(folder / "tiny.png", torch.rand(1, 1, 1, 3))
    save_png(folder / "black.png", torch.zeros(1, 90, 70, 3))
    save_png(folder / "wide.png", torch.ones(1, 40, 90, 3))
    save_file({"model.diffusion_model.x": torch.zeros(1)}, folder / "single.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, folder / "lora.safetensors")
    (folder / "flux").mkdir()
    (folder / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    shutil.copytree(files / "sd", folder / "damaged")
    weights = folder / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_line_and_leaves_no_file(case, files, bad_files, capsys):
    options, message = BAD[case]

    def fill(value):
        return value.format(t=bad_files, f=files) if isinstance(value, str) else value

    filled = {
        k: [fill(x) for x in v] if isinstance(v, list) else fill(v) for k, v in options.items()
    }
    before = sorted(bad_files.parent.rglob("*"))
    assert main(arguments(files, filled.pop("out", bad_files / "out"), **filled)) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("warning: photo")]
    assert [line for line in errors if "leak" not in line] == errors[-1:]
    assert errors[-1].startswith("error: ")
    assert message in errors[-1]
    assert captured.out == ""
    assert sorted(bad_files.parent.rglob("*")) == before


def test_a_file_without_read_permission_or_a_failing_disk_is_one_line(
    files, tmp_path, capsys, monkeypatch
):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(arguments(files, tmp_path / "out")) == 2
    assert "Permission denied. Give --out a folder" in capsys.readouterr().err


def test_interruption_is_no_traceback(files, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dreamcache_core.pipeline.pipeline.load_adapters", interrupt)
    assert main(arguments(files, tmp_path / "out")) == 130
    assert not (tmp_path / "out").exists()


# --- inspect


def inspect(path, capsys):
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_inspect_own_adapters(files, capsys):
    said = inspect(files / "sd.safetensors", capsys)
    assert said["kind"] == "DreamCache adapters, own format"
    assert said["family"].startswith("custom-64")
    assert said["parameters"] == "253,568"
    assert (said["dtype"], said["timestep"]) == ("float32", "1")
    assert "output_blocks.10.1 (32)" in said["layers"]


def test_inspect_released_adapters(files, capsys):
    said = inspect(files / "released.pt", capsys)
    assert said["kind"] == "DreamCache adapters, as released"
    assert "sd21" in said["family"]
    assert "assumed" in said["family"]


def test_inspect_saved_reference(files, capsys):
    said = inspect(files / "ref.safetensors", capsys)
    assert said["kind"] == "saved DreamCache reference"
    assert (said["images"], said["seed"], said["mask"]) == ("2", "5", "none")
    assert said["latent"] == "8 x 8 (height x width)"


def test_inspect_shows_settings_one_by_one_and_not_those_left_out(files, tmp_path, capsys):
    adapters = load_adapters(files / "sd.safetensors")
    extra = {"training": '{"steps": 10, "encoded": null, "layers": []}', "note": "[1"}
    adapters.info = dataclasses.replace(adapters.info, extra=extra)
    save_adapters(adapters, tmp_path / "a.safetensors")
    said = inspect(tmp_path / "a.safetensors", capsys)
    assert (said["  training"], said["    steps"], said["  note"]) == ("", "10", "[1")
    assert not {"    encoded", "    layers"} & set(said)


def test_inspect_shows_names_and_metadata_of_strangers_on_lines_of_their_own(
    files, tmp_path, capsys
):
    adapters = load_adapters(files / "sd.safetensors")
    extra = {"licence": "none\nkind: trusted\x1b[2J", "a\rb": "c", "file": "/x", "parameters": "7"}
    adapters.info = dataclasses.replace(adapters.info, extra=extra)
    save_adapters(adapters, tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert r"none\nkind: trusted\x1b[2J" in shown
    own, said = shown.split("the file says:")
    assert f"file:        {tmp_path / 'a.safetensors'}\n" in own
    assert all(line.startswith("  ") for line in said.strip("\n").split("\n"))
    assert all(line.isprintable() for line in shown.split("\n"))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_x.lora_up.weight", "a LoRA"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("model.diffusion_model.x", "a base model"),
    ],
)
def test_inspect_names_foreign_weights(key, kind, tmp_path, capsys):
    save_file({key: torch.zeros(1)}, tmp_path / "x.safetensors")
    assert inspect(tmp_path / "x.safetensors", capsys)["kind"].startswith(kind)


@pytest.mark.parametrize("name", ["none", "page.pt", "huge.png", "cut.safetensors"])
def test_inspect_refuses_what_holds_no_weights(name, bad_files, capsys):
    assert main(["inspect", str(bad_files / name)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# --- convert


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_convert_released_adapters(dtype, files, tmp_path, capsys):
    target = tmp_path / "own.safetensors"
    extra = [] if dtype is None else ["--dtype", dtype]
    words = ["convert", str(files / "released.pt"), str(target), "--family", "custom-48", *extra]
    assert main(words) == 0
    before = load_adapters(files / "released.pt", family="custom-48").state_dict()
    after = load_adapters(target)
    assert after.family == "custom-48"
    kept = getattr(torch, dtype or "float32")
    assert {tensor.dtype for tensor in load_file(target).values()} == {kept}
    for key, tensor in after.state_dict().items():
        assert torch.equal(tensor, before[key].to(kept).float())


def test_convert_refuses_to_overwrite_without_force(files, tmp_path, capsys):
    target = tmp_path / "own.safetensors"
    target.write_text("precious")
    words = ["convert", str(files / "released.pt"), str(target)]
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    assert target.read_text() == "precious"
    assert main([*words, "--force"]) == 0
    assert "sd21" in capsys.readouterr().err
    assert load_adapters(target).family == "sd21"


@pytest.mark.parametrize(
    ("source", "target", "extra", "message"),
    [
        ("{f}/released.pt", "{t}/own.pt", [], ".safetensors"),
        ("{f}/released.pt", "{t}/none/own.safetensors", [], "no folder"),
        ("{f}/released.pt", "{t}/own.safetensors", ["--family", "sd9"], "sd9"),
        ("{f}/sd.safetensors", "{t}/own.safetensors", ["--family", "sd15"], "in our format"),
        ("{f}/ref.safetensors", "{t}/own.safetensors", [], "reference/1"),
        ("{f}/photo.png", "{t}/own.safetensors", [], "photo.png"),
    ],
)
def test_convert_refuses_bad_input(source, target, extra, message, files, tmp_path, capsys):
    paths = [text.format(f=files, t=tmp_path) for text in (source, target)]
    assert main(["convert", *paths, *extra]) == 2
    captured = capsys.readouterr().err.splitlines()
    assert captured[-1].startswith("error: ")
    assert message in captured[-1]
    assert list(tmp_path.iterdir()) == []


def test_convert_refuses_values_that_overflow(files, tmp_path, capsys):
    weights = load_case("sd21_tiny").adapter_weights
    key = next(iter(weights))
    torch.save({**weights, key: weights[key] + 1e6}, tmp_path / "big.pt")
    words = ["convert", str(tmp_path / "big.pt"), str(tmp_path / "own.safetensors")]
    assert main([*words, "--dtype", "float16"]) == 2
    assert "bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "own.safetensors").exists()


def test_a_reader_that_has_enough_ends_the_program_without_an_error(files):
    file = str(files / "sd.safetensors")
    command = [sys.executable, "-u", "-m", "dreamcache_core", "inspect", file]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
