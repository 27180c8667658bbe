"""Building a synthetic set with tiny real models: what is written, what is resumed, what is refused."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipeline import tiny_pipeline
from tiny_segmenters import save_clipseg, save_grounding_dino, save_sam
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from dreamcache_core.cli.main import main
from dreamcache_core.data.order import sample_seed
from dreamcache_core.data.synthetic.building import build, summarise
from dreamcache_core.data.synthetic.folder import read_rejections
from dreamcache_core.data.synthetic.options import BuildOptions
from dreamcache_core.data.synthetic.segmentation import ClipSegmenter, GroundedSegmenter
from dreamcache_core.errors import (
    DreamCacheError,
    FileFormatError,
    InputError,
    UnsupportedModelError,
)
from dreamcache_core.images.files import read_image, read_mask

pytestmark = pytest.mark.diffusers

CAPTIONS = "a cat\tthe cat\na dog, here\nbird\n"
COUNT = 8
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models, captions, and a set built without interruption."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline(folder).save_pretrained(folder / "sd")
    save_clipseg(folder / "clipseg")
    save_grounding_dino(folder / "dino")
    save_sam(folder / "sam")
    (folder / "captions.txt").write_text(CAPTIONS)
    build(options(folder, folder / "whole"), has_bar=False)
    build(options(folder, folder / "shards", form="shards", shard_size=4), has_bar=False)
    return folder


def settings(files, out, **changes):
    return {
        "out": str(out),
        "model": str(files / "sd"),
        "segmenter_model": str(files / "clipseg"),
        "captions": str(files / "captions.txt"),
        "count": COUNT,
        "steps": 1,
        "width": 64,
        "height": 48,
        "batch_size": 2,
        # random masks are scattered: these limits keep some of them
        "mask_threshold": 0.6,
        "min_main_share": 0.5,
        "allow_border": True,
        **changes,
    }


def options(files, out, **changes):
    return BuildOptions.from_dict(settings(files, out, **changes))


def contents(folder):
    """Every file, hidden ones too, but for the logs."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def captions_in(folder):
    return {path.name[:8]: path.read_text() for path in folder.rglob("*_caption.txt")}


def log_of(folder):
    lines = [line for log in folder.glob("*.jsonl") for line in log.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda entry: entry["number"])


def test_every_sample_is_either_kept_with_three_files_or_logged(files):
    kept, rejected = captions_in(files / "whole"), read_rejections(files / "whole")
    assert kept
    assert rejected
    assert sorted([*map(int, kept), *rejected]) == list(range(COUNT))
    expected = {"build.json"}
    for number in map(int, kept):
        stem = f"{('a-cat', 'a-dog', 'bird')[number % 3]}/{number:08d}"
        expected |= {f"{stem}_{end}" for end in ("generation.png", "mask.png", "caption.txt")}
        assert kept[f"{number:08d}"] == ("the cat", "a dog, here", "bird")[number % 3]
    assert set(contents(files / "whole")) == expected


def test_images_and_masks_have_the_size_asked_for_and_masks_are_black_and_white(files):
    stems = [path.name[:8] for path in (files / "whole").rglob("*_caption.txt")]
    for stem in stems:
        (image,) = (files / "whole").rglob(f"{stem}_generation.png")
        assert read_image(image)[0].shape == (1, 48, 64, 3)
        mask = read_mask(image.with_name(f"{stem}_mask.png"))
        assert mask.shape == (1, 48, 64)
        assert set(mask.unique().tolist()) == {0, 1}
        with Image.open(image) as opened:
            facts = json.loads(opened.text["dreamcache"])
        assert facts["seed"] == sample_seed(0, int(stem))
        assert facts["subject"].replace(" ", "-") == image.parent.name


def test_the_log_says_which_sample_was_rejected_and_why(files):
    for entry in log_of(files / "whole"):
        assert entry["reason"] == "scattered"
        assert 0 < entry["value"] < 0.5
        assert entry["subject"] == ("a cat", "a dog", "bird")[entry["number"] % 3]
        assert entry["seed"] == sample_seed(0, entry["number"])


def test_the_kept_mask_is_the_one_that_the_segmenter_finds_in_the_written_image(files):
    segment = ClipSegmenter(str(files / "clipseg"), threshold=0.6, device=CPU)
    path = next((files / "whole").rglob("*_generation.png"))
    found = segment(read_image(path)[0], path.parent.name.replace("-", " "))
    kept = read_mask(path.with_name(path.name.replace("generation", "mask"))) > 0.5
    assert torch.equal(kept & found, kept)
    assert kept.sum() >= 0.5 * found.sum()


def test_noise_differs_between_samples_of_one_caption_and_between_seeds():
    seeds = [sample_seed(seed, number) for seed in range(3) for number in range(100)]
    assert len(set(seeds)) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_two_processes_make_the_same_set_as_one(files, tmp_path):
    for index in (1, 0):
        build(options(files, tmp_path / "two"), process_index=index, num_processes=2, has_bar=False)
    assert contents(tmp_path / "two") == contents(files / "whole")
    assert log_of(tmp_path / "two") == log_of(files / "whole")
    assert summarise(options(files, tmp_path / "two")) == summarise(options(files, files / "whole"))


def test_shards_hold_the_same_members_whatever_the_number_of_processes(files, tmp_path):
    loose, packed = contents(files / "whole"), contents(files / "shards")
    members = {}
    for name in packed.keys() - {"build.json"}:
        with tarfile.open(files / "shards" / name) as tar:
            for member in tar.getmembers():
                key, _, end = member.name.partition(".")
                number = int(key.rpartition("-")[2])
                assert name == f"shard-{number // 4:06d}.tar"
                stem = f"{key.rpartition('-')[0]}/{number:08d}"
                members[f"{stem}_{end}"] = tar.extractfile(member).read()
    assert members == {name: data for name, data in loose.items() if name != "build.json"}
    changes = {"form": "shards", "shard_size": 4}
    for index in (1, 0):
        again = options(files, tmp_path / "two", **changes)
        build(again, process_index=index, num_processes=2, has_bar=False)
    assert contents(tmp_path / "two") == packed


def fail_at(monkeypatch, call):
    """Let the disk be full at the given write: half of the file gets there."""
    write, calls = Path.write_bytes, iter(range(1000))

    def write_half(path, content):
        if next(calls) < call:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_half)


@pytest.mark.parametrize(("form", "call"), [("folder", 2), ("folder", 3), ("shards", 6)])
def test_a_full_disk_loses_nothing_and_a_restart_ends_with_the_same_set(
    files, tmp_path, monkeypatch, form, call
):
    changes = {"form": form, "shard_size": 4} if form == "shards" else {}
    wanted = options(files, tmp_path / "set", **changes)
    with monkeypatch.context() as context:
        fail_at(context, call)
        with pytest.raises(OSError, match="No space"):
            build(wanted, has_bar=False)
    before = contents(tmp_path / "set")
    assert not [name for name in before if name.endswith(".tmp")]
    assert len(captions_in(tmp_path / "set")) == (call - 1) // 3
    build(wanted, has_bar=False)
    whole = files / ("whole" if form == "folder" else "shards")
    assert contents(tmp_path / "set") == contents(whole)
    assert log_of(tmp_path / "set") == log_of(whole)


def test_a_kill_in_the_middle_of_a_line_or_file_is_made_good(files, tmp_path):
    shutil.copytree(files / "whole", tmp_path / "set")
    caption = next((tmp_path / "set").rglob("*_caption.txt"))
    caption.unlink()
    torn = caption.with_name(f".{caption.name}.tmp")
    torn.write_text("a")
    (log,) = (tmp_path / "set").glob("*.jsonl")
    log.write_text(log.read_text()[:-20])
    build(options(files, tmp_path / "set"), has_bar=False)
    assert contents(tmp_path / "set") == contents(files / "whole")
    assert read_rejections(tmp_path / "set") == read_rejections(files / "whole")


def test_what_is_finished_is_neither_made_again_nor_are_models_loaded_for_it(files, tmp_path):
    models = {name: tmp_path / name / name for name in ("sd", "clipseg")}
    for form in ("whole", "shards"):
        shutil.copytree(files / form, tmp_path / form)
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / form).rglob("*_*.png")}
        changes = {"form": "shards", "shard_size": 4} if form == "shards" else {}
        places = {"model": str(models["sd"]), "segmenter_model": str(models["clipseg"])}
        build(options(files, tmp_path / form, **changes, **places), has_bar=False)
        assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_folder_may_grow_by_a_larger_count(files, tmp_path):
    build(options(files, tmp_path / "set", count=3, batch_size=1), has_bar=False)
    build(options(files, tmp_path / "set"), has_bar=False)
    assert captions_in(tmp_path / "set") == captions_in(files / "whole")


def test_the_lists_that_ship_are_used_without_captions(files, tmp_path):
    changes = {"captions": None, "count": 2, "min_main_share": 0.0}
    assert main(["dataset", "build", *flags(settings(files, tmp_path / "set", **changes))]) == 0
    captions = captions_in(tmp_path / "set")
    assert len(captions) == 2
    assert all(", " in caption for caption in captions.values())


def flags(values):
    return [f"--{key}={value}" for key, value in values.items() if value is not None]


def test_the_command_prints_what_was_kept_and_why_not(files, tmp_path, capsys):
    assert main(["dataset", "build", *flags(settings(files, tmp_path / "set"))]) == 0
    rejected = len(read_rejections(files / "whole"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{COUNT - rejected} of {COUNT} samples kept",
        f"  {rejected} rejected: scattered",
    ]
    assert contents(tmp_path / "set") == contents(files / "whole")


def test_a_build_that_keeps_nothing_fails_and_what_it_rejected_can_be_looked_at(
    files, tmp_path, capsys
):
    given = settings(files, tmp_path / "set", max_area=0.021, rejected=str(tmp_path / "left"))
    assert main(["dataset", "build", *flags(given)]) == 2
    out, err = capsys.readouterr()
    assert f"0 of {COUNT} samples kept" in out
    assert f"None of {COUNT} samples was kept" in err
    rejections = read_rejections(tmp_path / "set")
    names = sorted(f"{number:08d} {reason}.png" for number, reason in rejections.items())
    assert sorted(path.name for path in (tmp_path / "left").iterdir()) == names
    both = read_image(tmp_path / "left" / names[0])[0]
    assert both.shape[1:3] == (48, 128)
    assert set(both[:, :, 64:].unique().tolist()) == {0, 1}


@pytest.mark.slow
def test_launched_processes_share_the_work(files, tmp_path):
    script = tmp_path / "build.py"
    script.write_text(
        "import sys\nfrom dreamcache_core.cli import main\nsys.exit(main(['dataset', 'build', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, str(script), *flags(settings(files, tmp_path / "set")), "--cpu"]
    port = free_port()
    both = [start_process(command, rank, port) for rank in (0, 1)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert ["samples kept" in out for out, _ in outputs] == [True, False]
    assert captions_in(tmp_path / "set") == captions_in(files / "whole")
    # not bit by bit: the last bits of a matrix product on the CPU depend on where its operands lie
    for path in (files / "whole").rglob("*_generation.png"):
        again = tmp_path / "set" / path.relative_to(files / "whole")
        assert (read_image(again)[0] - read_image(path)[0]).abs().max() < 1.5 / 255
    rejected = [
        {json.loads(line)["number"] for line in log.read_text().splitlines()}
        for log in sorted((tmp_path / "set").glob("*.jsonl"))
    ]
    assert set.union(*rejected) == set(read_rejections(files / "whole"))
    # batches of two, dealt out in turn
    assert [{number // 2 % 2 for number in part} for part in rejected] == [{0}, {1}]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start_process(command, rank, port):
    """Start one of two processes as torchrun does."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, **pipes)


def test_clipseg_listens_to_the_subject_and_a_higher_threshold_marks_less(files):
    image = torch.rand(1, 48, 80, 3, generator=torch.Generator().manual_seed(0))
    low, high = (
        ClipSegmenter(str(files / "clipseg"), threshold=threshold, device=CPU)
        for threshold in (0.4, 0.6)
    )
    mask = low(image, "a cat")
    assert mask.shape == (1, 48, 80)
    assert mask.dtype == torch.bool
    assert 0 < high(image, "a cat").sum() < mask.sum()
    assert torch.equal(high(image, "a cat") & mask, high(image, "a cat"))
    assert not torch.equal(mask, low(image, "b"))
    assert low(image, "long " * 40).shape == (1, 48, 80)


def test_grounding_dino_gives_sam_its_best_box_in_pixels(files):
    image = Image.frombytes("RGB", (80, 48), bytes(i * 7919 % 251 for i in range(80 * 48 * 3)))
    segmenter = grounded(files, 0.1)
    processor = AutoProcessor.from_pretrained(files / "dino")
    model = AutoModelForZeroShotObjectDetection.from_pretrained(files / "dino").eval()
    with torch.inference_mode():
        outputs = model(**processor(images=image, text="a cat.", return_tensors="pt"))
    best = outputs.logits[0].max(dim=-1).values.argmax()
    x, y, width, height = outputs.pred_boxes[0, best].tolist()
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    expected = [value * side for value, side in zip(corners, (80, 48, 80, 48), strict=True)]
    assert segmenter._best_box(image, "A cat.") == pytest.approx(expected, abs=1e-3)


def grounded(files, threshold):
    folders = str(files / "dino"), str(files / "sam")
    return GroundedSegmenter(*folders, box_threshold=threshold, device=CPU)


def test_grounded_sam_marks_nothing_where_no_box_is_good_enough(files):
    image = torch.rand(1, 48, 80, 3, generator=torch.Generator().manual_seed(0))
    mask = grounded(files, 0.1)(image, "a cat")
    assert mask.shape == (1, 48, 80)
    assert mask.dtype == torch.bool
    assert 0 < mask.sum() < 48 * 80
    nothing = grounded(files, 0.9999999)(image, "a cat")
    assert nothing.shape == (1, 48, 80)
    assert not nothing.any()


def test_a_set_is_built_with_grounded_sam(files, tmp_path):
    models = {"segmenter_model": str(files / "sam"), "detector_model": str(files / "dino")}
    wanted = options(files, tmp_path / "set", segmenter="grounded-sam", **models)
    build(wanted, has_bar=False)
    summary = summarise(wanted)
    assert len(captions_in(tmp_path / "set")) == summary.kept
    assert summary.kept + len(log_of(tmp_path / "set")) == COUNT


def test_images_that_overflowed_are_rejected_as_blank_and_the_build_goes_on(files, tmp_path):
    pipeline = tiny_pipeline(tmp_path)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "sd")
    wanted = options(files, tmp_path / "set", model=str(tmp_path / "sd"), count=2)
    build(wanted, has_bar=False)
    assert summarise(wanted).rejected == {"blank image": 2}
    assert [entry["reason"] for entry in log_of(tmp_path / "set")] == ["blank image"] * 2


def test_a_model_without_an_image_to_show_is_rejected_as_blank(files, tmp_path):
    pipeline = tiny_pipeline(tmp_path)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.zero_()
    pipeline.save_pretrained(tmp_path / "sd")
    wanted = options(files, tmp_path / "set", model=str(tmp_path / "sd"), count=2)
    build(wanted, has_bar=False)
    assert summarise(wanted).rejected == {"blank image": 2}
    assert str(summarise(wanted)) == "0 of 2 samples kept\n  2 rejected: blank image"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"captions": "{files}/none.txt"}, InputError, "cannot be read"),
        ({"captions": "{files}/empty.txt"}, InputError, "is empty"),
        ({"model": "{files}/none"}, FileFormatError, "no model_index.json"),
        ({"model": "{files}/clipseg"}, FileFormatError, "no model_index.json"),
        ({"model": "{files}/damaged"}, FileFormatError, "could not be loaded"),
        ({"pipeline_class": "NoSuchPipeline"}, InputError, "no 'NoSuchPipeline'"),
        ({"segmenter_model": "{files}/none"}, InputError, "there is no"),
        ({"segmenter_model": "{files}/sam"}, UnsupportedModelError, "holds a sam model"),
        ({"segmenter_model": "{files}/sd"}, FileFormatError, "no config.json"),
        ({"segmenter_model": "{files}/torn"}, FileFormatError, "could not be loaded"),
        ({"segmenter_model": "{files}/lacking"}, FileFormatError, "1 are missing"),
        (
            {"segmenter": "grounded-sam", "detector_model": "{files}/sam"},
            UnsupportedModelError,
            "detector_model",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(files, tmp_path, changes, error, message):
    (files / "empty.txt").write_text("\n \n")
    (files / "damaged").mkdir(exist_ok=True)
    (files / "damaged" / "model_index.json").write_text("{}")
    shutil.copytree(files / "clipseg", files / "torn", dirs_exist_ok=True)
    weights = files / "torn" / "model.safetensors"
    tensors = load_file(weights)
    shutil.copytree(files / "clipseg", files / "lacking", dirs_exist_ok=True)
    tensors.pop(next(name for name in tensors if name.endswith("weight")))
    save_file(tensors, files / "lacking" / "model.safetensors", metadata={"format": "pt"})
    weights.write_bytes(weights.read_bytes()[:100])
    changes = {key: value.format(files=files) for key, value in changes.items()}
    with pytest.raises(error, match=message):
        build(options(files, tmp_path / "set", **changes), has_bar=False)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count"),
        ({"steps": 0}, "steps"),
        ({"height": 50}, "height"),
        ({"mask_threshold": 1.0}, "mask_threshold"),
        ({"min_area": 0.9}, "min_area"),
        ({"subjects": "s.txt"}, "got both"),
        ({"segmenter": "grounded-sam"}, "detector_model"),
        ({"detector_model": "dino"}, "detector_model"),
        ({"stepz": 1}, "'steps'"),
    ],
)
def test_options_that_cannot_be_are_refused(files, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        options(files, tmp_path, **changes)


def test_a_folder_with_other_things_is_left_alone(files, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="holds other files"):
        build(options(files, tmp_path), has_bar=False)
    with pytest.raises(InputError, match="a folder that can be written to"):
        build(options(files, tmp_path / "letter.txt"), has_bar=False)
    assert contents(tmp_path) == {"letter.txt": b"dear"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2}, "steps was 1, is 2"),
        ({"form": "shards"}, "form was 'folder', is 'shards'"),
        ({"captions": None}, "captions_sha256"),
    ],
)
def test_a_restart_with_other_settings_is_refused(files, changes, message):
    before = contents(files / "whole")
    with pytest.raises(DreamCacheError, match=message):
        build(options(files, files / "whole", **changes), has_bar=False)
    assert contents(files / "whole") == before
