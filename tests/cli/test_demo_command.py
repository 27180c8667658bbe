"""``dreamcache demo``: what it writes, and what it says to bad input. Uses the model that comes along."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamcache_core.cli.main import main
from dreamcache_core.demo.files import demo_folder, require_demo_files
from dreamcache_core.demo.gallery import (
    GUIDANCE_SCALE,
    IMAGE_RANGE,
    SCENES_SHOWN,
    SHAPES_SHOWN,
    STEPS,
    choose_themes,
)
from research.evidence.conditions import CHOSEN

pytestmark = pytest.mark.diffusers

torch.set_num_threads(1)

LIMIT_BYTES = 25 * 2**20


def demo(out: Path, *flags: str) -> int:
    return main(["demo", "--out", str(out), "--steps", "2", *flags])


def test_own_prompt_gives_an_image_with_and_one_without_the_reference(tmp_path: Path):
    prompt = "a mug in the snow"
    assert demo(tmp_path, "--subject", "mug", "--prompt", prompt, "--seed", "5") == 0
    names = {path.name for path in tmp_path.iterdir()}
    images = {"mug_0_with_reference.png", "mug_0_without_reference.png"}
    assert names == {"contact_sheet.png", "mug_reference.png", *images}
    opened = [Image.open(tmp_path / name) for name in sorted(images)]
    assert [image.size for image in opened] == [(128, 128)] * 2
    assert not np.array_equal(*(np.asarray(image) for image in opened))
    parameters = json.loads(opened[0].info["dreamcache"])
    assert parameters["prompt"] == prompt
    assert parameters["seed"] == 5
    assert parameters["cfg"] == GUIDANCE_SCALE
    assert parameters["image_range"] == list(IMAGE_RANGE)


def test_own_reference_is_shown_in_three_scenes(tmp_path: Path):
    drawing = Image.new("RGB", (90, 60), (250, 120, 0))
    drawing.save(tmp_path / "drawing.png")
    reference = str(tmp_path / "drawing.png")
    assert demo(tmp_path / "out", "--reference", reference, "--subject", "umbrella") == 0
    images = sorted((tmp_path / "out").glob("own_*_with_reference.png"))
    assert len(images) == 3
    for path in images:
        with Image.open(path) as image:
            prompt = json.loads(image.info["dreamcache"])["prompt"]
        assert prompt.startswith("an umbrella ")


def test_same_seed_draws_the_same_image(tmp_path: Path):
    for name in ("first", "second"):
        assert demo(tmp_path / name, "--subject", "star", "--prompt", "a star at night") == 0
    first, second = (
        np.asarray(Image.open(tmp_path / name / "star_0_with_reference.png"))
        for name in ("first", "second")
    )
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--subject", "zebra"], "--subject must be one of ball, star"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--reference", "missing.png"], "missing.png"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
):
    assert main(["demo", "--out", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_themes_are_of_subjects_that_adapter_training_never_saw():
    themes = choose_themes(seed=0)
    assert [theme.name for theme in themes] == list(SHAPES_SHOWN)
    for theme in themes:
        assert theme.subject is not None
        assert theme.subject.is_unseen
        assert len(theme.prompts) == len(SCENES_SHOWN)
        assert all(theme.name in prompt for prompt in theme.prompts)


def test_quickstart_workflow_samples_as_the_command_does():
    root = Path(__file__).parents[2]
    text = (root / "example_workflows" / "DreamCache 1 - Quickstart (no download).json").read_text(
        encoding="utf-8"
    )
    nodes = json.loads(text)["nodes"]
    samplers = [node["widgets_values"] for node in nodes if node["type"] == "KSampler"]
    scheduler = require_demo_files().scheduler_config()
    assert scheduler["_class_name"] == "EulerAncestralDiscreteScheduler"
    assert scheduler["timestep_spacing"] == "trailing"
    assert [sampler[2:6] for sampler in samplers] == [
        [STEPS, GUIDANCE_SCALE, "euler_ancestral", "sgm_uniform"]
    ] * 2
    (photo,) = (node for node in nodes if node["type"] == "DreamCacheFromPhoto")
    (mask,) = (slot for slot in photo["inputs"] if slot["name"] == "mask")
    assert (mask["link"] is not None) == CHOSEN.masked


def test_what_comes_along_is_below_25_mb():
    package = demo_folder().parent
    kinds = ("demo/**/*", "evaluation/**/*")
    files = [path for kind in kinds for path in package.glob(kind) if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LIMIT_BYTES
