"""``dataset masks`` with tiny real segmenters: what is written where, what is left alone, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_segmenters import save_clipseg, save_grounding_dino, save_sam
from training_set import write_captioned, write_pairs

from dreamcache_core.cli.main import main
from dreamcache_core.data.sources.opening import open_source

pytestmark = pytest.mark.diffusers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for save in (save_clipseg, save_grounding_dino, save_sam):
        save(folder / save.__name__.removeprefix("save_"))
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    """Six images with captions: one with a mask, one with transparent parts, one damaged."""
    folder = write_captioned(tmp_path / "images")
    for mask in sorted((folder / "masks").rglob("*.png"))[1:]:
        mask.unlink()
    cutout = Image.open(folder / "subject_1" / "001.png").convert("RGBA")
    cutout.putalpha(Image.linear_gradient("L").resize(cutout.size))
    cutout.save(folder / "subject_1" / "001.png")
    damaged = folder / "subject_1" / "005.png"
    damaged.write_bytes(damaged.read_bytes()[:90])
    return folder


def masks(folder: Path) -> dict[str, bytes]:
    found = (folder / "masks").rglob("*.png")
    return {path.relative_to(folder / "masks").as_posix(): path.read_bytes() for path in found}


def mask(images: Path, models: Path, *flags: str) -> int:
    command = ["dataset", "masks", str(images), "--model", str(models / "clipseg"), "--cpu"]
    return main([*command, "--mask_threshold", "0.3", *flags])


def test_images_without_a_mask_get_one_where_the_set_reads_it(images, models, capsys):
    before = masks(images)
    assert mask(images, models) == 0
    out, err = capsys.readouterr()
    assert sorted(masks(images)) == [f"subject_{n % 2}/00{n}.png" for n in (0, 2, 4, 3)]
    assert before.items() < masks(images).items()
    assert [line.strip() for line in sorted(out.splitlines()[:3], reverse=True)] == [
        "3  masks were written",
        "2  had a mask, or transparent parts",
        "1  cannot be read",
    ]
    assert "subject_1/005.png" in err
    source = open_source(images)
    pair = source.read(source.keys.index("subject_0/002.png"))
    assert pair.mask is not None
    assert set(pair.mask.unique().tolist()) <= {0, 1}


def test_what_is_there_stays_and_what_is_missing_is_made_again_alike(images, models, capsys):
    assert mask(images, models) == 0
    whole = masks(images)
    times = {name: os.stat(images / "masks" / name).st_mtime_ns for name in whole}
    (images / "masks" / "subject_0" / "004.png").unlink()
    assert mask(images, models) == 0
    assert masks(images) == whole
    again = {name: os.stat(images / "masks" / name).st_mtime_ns for name in whole}
    assert [name for name in whole if again[name] != times[name]] == ["subject_0/004.png"]


def test_two_processes_make_the_same_masks(images, models):
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    command = [sys.executable, *words, "-m", "dreamcache_core", "dataset", "masks", str(images)]
    command += ["--model", str(models / "clipseg"), "--mask_threshold", "0.3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3  masks were written" in done.stdout
    made = masks(images)
    for name in ("subject_0/002.png", "subject_0/004.png", "subject_1/003.png"):
        (images / "masks" / name).unlink()
    assert mask(images, models) == 0
    assert masks(images) == made


def test_doubts_are_named_and_a_subject_that_is_not_found_leaves_no_mask(images, models, capsys):
    assert mask(images, models, "--mask_threshold", "0.9999", "--subject", "a cat") == 0
    out, err = capsys.readouterr()
    assert "3  without a subject that was found" in out
    assert "'a cat' was not found; paint the mask" in err
    assert sorted(masks(images)) == ["subject_0/000.png"]
    assert mask(images, models, "--mask_threshold", "0.0001") == 0
    assert "004.png: too large" in capsys.readouterr().err
    with Image.open(images / "masks" / "subject_0" / "004.png") as image:
        assert (image.size, image.convert("L").getextrema()) == ((96, 80), (255, 255))


def test_a_detector_finds_the_box_and_its_threshold_decides(images, models, capsys):
    flags = ["--model", str(models / "sam"), "--detector_model", str(models / "grounding_dino")]
    assert mask(images, models, *flags, "--box_threshold", "0.9999") == 0
    assert "3  without a subject that was found" in capsys.readouterr().out
    assert len(masks(images)) == 1
    assert mask(images, models, *flags, "--box_threshold", "0.0001") == 0
    assert "3  masks were written" in capsys.readouterr().out
    assert len(masks(images)) == 4


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--mask_threshold", "1"], "mask_threshold in (0, 1)"),
        (["--model", "none"], "--model"),
        (["--detector_model", "none"], "--detector_model"),
    ],
)
def test_bad_input_is_refused(images, models, flags, cause, capsys):
    assert mask(images, models, *flags) == 2
    assert cause in capsys.readouterr().err
    assert len(masks(images)) == 1


def test_sets_that_name_their_masks_are_refused(tmp_path, models, capsys):
    assert mask(write_pairs(tmp_path / "pairs"), models) == 2
    assert "folder of images with captions" in capsys.readouterr().err
