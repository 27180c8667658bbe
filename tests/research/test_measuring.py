"""``python -m research.evidence``: what it measures and writes; the shipped model keeps subjects."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamcache_core.demo.files import require_demo_files
from dreamcache_core.demo.gallery import IMAGE_RANGE
from dreamcache_core.demo.measures import match as demo_measures
from dreamcache_core.demo.world import world
from dreamcache_core.images.tensors import image_to_tensor
from dreamcache_core.method.adapter_files import load_adapters, save_adapters
from dreamcache_core.method.blending import ReferenceUse
from dreamcache_core.pipeline.loading import load_diffusers_pipeline
from dreamcache_core.pipeline.pipeline import DreamCachePipeline
from research.evidence.__main__ import main
from research.evidence.conditions import CHOSEN, NO_REFERENCE, all_conditions
from research.evidence.results import fingerprint_of_measure, read_judgements
from research.evidence.sampling import generate_images
from research.evidence.triples import draw_triples

pytestmark = pytest.mark.diffusers

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipeline() -> DreamCachePipeline:
    return DreamCachePipeline(load_diffusers_pipeline(require_demo_files().model))


def evaluate(tmp_path: Path, *conditions: str, **changes: str) -> int:
    settings = {"combinations": "3", "shapes": "2", "steps": "1", "batch_size": "2", **changes}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    folders = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "pages")]
    return main([*flags, *folders, "--conditions", *conditions])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"references": 2},
        {"references": 2, "masked": False},
        {"image_range": (0.0, 0.5)},
    ],
    ids=str,
)
def test_image_of_a_triple_does_not_depend_on_its_batch(
    pipeline: DreamCachePipeline, changes: dict[str, Any]
):
    adapters = load_adapters(require_demo_files().adapters)
    triples = draw_triples(0, combinations=2, shapes=1)
    condition = replace(CHOSEN, **changes)
    together = generate_images(pipeline, adapters, triples, condition, steps=2)
    alone = [generate_images(pipeline, adapters, [t], condition, steps=2)[0] for t in triples]
    difference = np.abs(together.astype(int) - np.stack(alone).astype(int))
    assert difference.max() <= 1


def test_several_masked_references_are_drawn_with_as_the_product_draws(
    pipeline: DreamCachePipeline,
):
    adapters = load_adapters(require_demo_files().adapters)
    triples = draw_triples(0, combinations=2, shapes=0)
    condition = replace(CHOSEN, references=2, mode="joint")
    measured = generate_images(pipeline, adapters, triples, condition, steps=1)
    for image, triple in zip(measured, triples, strict=True):
        references = torch.cat([image_to_tensor(triple.reference(n)) for n in range(2)])
        masks = torch.from_numpy(np.stack([triple.reference_mask(n) for n in range(2)]))
        drawn = pipeline(
            triple.prompt,
            ReferenceUse(pipeline.encode_reference(references, mask=masks), adapters),
            guidance_scale=condition.guidance_scale,
            guidance="joint",
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(triple.seed),
            output_type="pt",
        )[0]
        expected = (drawn.permute(1, 2, 0) * 255.0).round().byte().numpy()
        assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1


def test_reference_changes_the_image_and_another_subject_changes_it_otherwise(
    pipeline: DreamCachePipeline,
):
    adapters = load_adapters(require_demo_files().adapters)
    first, second = draw_triples(0, combinations=2, shapes=0)
    swapped = replace(first, subject=second.subject)
    plain = generate_images(pipeline, None, [first], NO_REFERENCE, steps=2)
    own = generate_images(pipeline, adapters, [first], CHOSEN, steps=2)
    other = generate_images(pipeline, adapters, [swapped], CHOSEN, steps=2)
    assert not np.array_equal(plain, own)
    assert not np.array_equal(own, other)


def test_the_mask_of_a_reference_covers_its_subject():
    triple = draw_triples(0, combinations=1, shapes=0)[0]
    mask, image = triple.reference_mask(1), np.asarray(triple.reference(1))
    assert mask.shape == (128, 128)
    assert (image[mask == 0] == 255).all()
    assert (image[mask == 1] != 255).any(axis=-1).mean() > 0.9


@pytest.mark.parametrize(
    ("changes", "predictions"),
    [
        ({}, 2.75),
        ({"image_range": (0.0, 1.0)}, 3.0),
        ({"image_guidance_scale": 1.0}, 2.0),
        ({"image_range": (0.0, 0.5)}, 2.5),
        ({"image_range": (0.25, 0.5)}, 2.25),
        ({"mode": "joint"}, 2.0),
        ({"adapters": None}, 2.0),
    ],
    ids=str,
)
def test_predictions_a_step_count_the_rows_of_the_unet(
    pipeline: DreamCachePipeline, changes: dict[str, Any], predictions: float
):
    condition = replace(CHOSEN, **changes)
    assert condition.predictions_a_step(8) == predictions
    adapters = load_adapters(require_demo_files().adapters) if condition.adapters else None
    rows: list[int] = []
    unet = pipeline.pipeline.unet
    hook = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    generate_images(pipeline, adapters, draw_triples(0, 1, 0), condition, steps=8)
    hook.remove()
    assert sum(rows[-8:]) == 8 * predictions


def test_every_condition_has_a_name_of_its_own():
    names = [condition.name for condition in all_conditions(["timestep-50", "merge-sum"])]
    assert len(set(names)) == len(names)
    trained = {c.name: c.captioned for c in all_conditions(["caption", "merge-sum"])}
    assert trained["variant caption"]
    assert not trained["variant merge-sum"]
    assert {"image guidance 0.4", "joint 3", "4 references", "variant merge-sum"} <= set(names)


def test_command_writes_a_page_of_all_groups_and_measures_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert evaluate(tmp_path, "no reference", "as shipped") == 0
    page = (tmp_path / "pages" / "README.md").read_text()
    assert "Known shapes in unseen patterns and colours" in page
    assert "Unseen shapes" in page
    assert page.count("| as shipped |") == 2
    assert "--conditions 'no reference' 'as shipped'`" in page, "can be repeated from the page"
    assert "| seed | 1 |" in page
    assert "| steps | 1 |" in page
    assert page.count("Through the model's autoencoder true images match") == 2
    assert page.count("the background of 100.0% and the shape of 100.0%") == 2
    assert (tmp_path / "pages" / "pareto.png").is_file()
    report = (tmp_path / "pages" / "report.html").read_text()
    assert report.count("data:image/jpeg") == 5 * 4  # reference, truth, two conditions
    rows = read_judgements(tmp_path / "results" / "as_shipped.jsonl")
    assert len(rows) == 5
    assert evaluate(tmp_path, "as shipped") == 0
    assert read_judgements(tmp_path / "results" / "as_shipped.jsonl") == rows
    assert "as shipped" in capsys.readouterr().out


def test_conditions_that_draw_alike_are_measured_once(tmp_path: Path):
    shipped = "guidance range {:g} to {:g}".format(*IMAGE_RANGE)
    assert evaluate(tmp_path, "1 reference", shipped) == 0
    assert {path.stem for path in (tmp_path / "results").rglob("*.jsonl")} == {"as_shipped"}
    page = (tmp_path / "pages" / "README.md").read_text()
    first, second = (
        next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        for name in ("1 reference", shipped)
    )
    assert first.split("|")[2:] == second.split("|")[2:]


def test_row_that_was_cut_off_is_measured_again(tmp_path: Path):
    evaluate(tmp_path, "no reference")
    path = tmp_path / "results" / "no_reference.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert len(read_judgements(path)) == 4
    assert evaluate(tmp_path, "no reference") == 0
    assert len(read_judgements(path)) == 5


def test_a_single_unseen_shape_is_refused_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert evaluate(tmp_path, "no reference", shapes="1") == 2
    assert "--shapes must be 0 or at least 2" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_another_world_or_measure_has_another_fingerprint(monkeypatch: pytest.MonkeyPatch):
    before = fingerprint_of_measure()
    assert fingerprint_of_measure() == before
    with monkeypatch.context() as patch:
        patch.setattr(demo_measures, "WORST_COLOUR_ERROR", 50.0)
        assert fingerprint_of_measure() != before
    with monkeypatch.context() as patch:
        patch.setattr(world, "MIRRORED_RATE", 1.0)
        assert fingerprint_of_measure() != before


def test_a_captioned_reference_sees_the_prompt_as_in_training(
    pipeline: DreamCachePipeline, monkeypatch: pytest.MonkeyPatch
):
    prompts: list[str] = []
    original = pipeline.encode_reference
    monkeypatch.setattr(
        pipeline,
        "encode_reference",
        lambda *args, **given: prompts.append(given["prompt"]) or original(*args, **given),
    )
    (triple,) = draw_triples(0, combinations=1, shapes=0)
    adapters = load_adapters(require_demo_files().adapters)
    for captioned in (False, True):
        condition = replace(CHOSEN, captioned=captioned)
        generate_images(pipeline, adapters, [triple], condition, steps=1)
    assert prompts == ["", triple.prompt]


def test_unknown_condition_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert evaluate(tmp_path, "image guidance 99") == 2
    assert "There is no condition 'image guidance 99'" in capsys.readouterr().err


def test_measurements_of_other_settings_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert evaluate(tmp_path, "no reference") == 0
    before = (tmp_path / "results" / "no_reference.jsonl").read_text()
    assert evaluate(tmp_path, "no reference", steps="2") == 2
    assert "measurements of another steps: 1, now 2" in capsys.readouterr().err
    assert evaluate(tmp_path, "no reference", dtype="bfloat16") == 2
    changed = tmp_path / "changed"
    shutil.copytree(require_demo_files().model, changed / "model")
    adapters = load_adapters(require_demo_files().adapters)
    save_adapters(adapters, changed / "adapters.safetensors", dtype=torch.bfloat16)
    assert evaluate(tmp_path, "no reference", folder=str(changed)) == 2
    assert "another adapters: " in capsys.readouterr().err
    variants = tmp_path / "variants"
    variants.mkdir()
    shutil.copyfile(require_demo_files().adapters, variants / "one.safetensors")
    assert evaluate(tmp_path, "no reference", variants=str(variants)) == 0, "one more may come"
    shutil.copyfile(changed / "adapters.safetensors", variants / "one.safetensors")
    assert evaluate(tmp_path, "no reference", variants=str(variants)) == 2, "but not change"
    assert (tmp_path / "results" / "no_reference.jsonl").read_text() == before


def test_half_precision_draws_nearly_the_same(tmp_path: Path):
    single, half = tmp_path / "single", tmp_path / "half"
    assert evaluate(single, "as shipped") == 0
    assert evaluate(half, "as shipped", dtype="bfloat16", device="cpu") == 0
    images = [
        np.stack(
            [np.asarray(Image.open(path)) for path in sorted((folder / "results").rglob("*.png"))]
        )
        for folder in (single, half)
    ]
    difference = np.abs(images[0].astype(int) - images[1].astype(int)).mean()
    assert 0 < difference < 4
