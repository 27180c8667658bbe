"""The classifier of the demo world, as it comes with the package."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dreamcache_core.demo.measures.classifier import (
    BACKGROUND_NAMES,
    FORMAT,
    SHAPE_NAMES,
    WEIGHTS,
    SceneClassifier,
    load_classifier,
    recognise,
    shrink,
)
from dreamcache_core.demo.world.world import Pose, Scene, Subject, render
from dreamcache_core.errors import FileFormatError
from dreamcache_core.files.tensor_file import read_tensor_file, write_tensor_file
from research.demo_model.train_classifier import (
    draw_labelled,
    measure,
    roughen,
    save_classifier,
)


def test_the_weights_are_small_and_state_their_accuracy() -> None:
    _, metadata = read_tensor_file(WEIGHTS, FORMAT)
    assert WEIGHTS.stat().st_size < 400_000
    assert float(metadata["background_accuracy"]) >= 0.98
    assert float(metadata["shape_accuracy"]) >= 0.98
    assert int(metadata["held_out"]) >= 1_000


def test_true_renders_of_another_seed_are_recognised() -> None:
    classifier = load_classifier()
    accuracies = measure(classifier, draw_labelled(100, seed=1234))
    assert accuracies.keys() == {
        "background_accuracy",
        "shape_accuracy",
        "rough_background_accuracy",
        "rough_shape_accuracy",
    }
    assert min(float(share) for share in accuracies.values()) > 0.97


@pytest.mark.parametrize(
    ("shape", "background"), [("ball", "night"), ("crown", "grass"), ("mug", "paper")]
)
def test_an_image_is_called_by_its_names(shape: str, background: str) -> None:
    subject = Subject(shape, "dots", ((214, 40, 40), (245, 245, 240)), (0, 12))
    image = render(subject, Scene(background), Pose(0.5, 0.53, 0.26), np.random.default_rng(0))
    (found,) = recognise(np.asarray(image)[None], load_classifier())
    assert (found.shape, found.background) == (shape, background)


def test_accuracy_is_the_share_of_right_answers() -> None:
    classifier = load_classifier()
    data = draw_labelled(4, seed=77)
    data.shapes[0] = (data.shapes[0] + 1) % len(SHAPE_NAMES)
    data.backgrounds[:2] = (data.backgrounds[:2] + 1) % len(BACKGROUND_NAMES)
    accuracies = measure(classifier, data)
    assert accuracies["shape_accuracy"] == "0.7500"
    assert accuracies["background_accuracy"] == "0.5000"


def test_each_row_is_the_image_of_its_place() -> None:
    classifier = load_classifier()
    data = [draw_labelled(1, seed=seed) for seed in range(3)]
    wide = np.stack([d.images[0].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1) for d in data])
    together = recognise(wide, classifier)
    assert [found.shape for found in together] == [
        recognise(image[None], classifier)[0].shape for image in wide
    ]


def test_images_shrink_by_averaging() -> None:
    image = np.zeros((1, 128, 128, 3), dtype=np.uint8)
    image[0, 0, :2] = 255
    small = shrink(image)
    assert small.shape == (1, 3, 64, 64)
    assert small[0, :, 0, 0].tolist() == [0.5] * 3
    assert small.sum().item() == 1.5


def test_roughened_images_keep_shape_and_range_and_are_decided_by_the_generator() -> None:
    images = draw_labelled(3, seed=5).images.float() / 255
    rough = roughen(images, torch.Generator().manual_seed(1))
    assert rough.shape == images.shape
    assert 0 <= rough.min() <= rough.max() <= 1
    assert torch.equal(rough, roughen(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(rough, roughen(images, torch.Generator().manual_seed(2)))


def test_a_classifier_survives_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = SceneClassifier().eval()
    save_classifier(classifier, tmp_path / "c.safetensors", {"steps": "0"})
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert read_tensor_file(tmp_path / "c.safetensors", FORMAT)[1]["steps"] == "0"
    image = torch.rand(2, 3, 64, 64)
    for before, after in zip(classifier(image), loaded(image), strict=True):
        assert torch.allclose(before, after, atol=5e-3)


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    write_tensor_file(tmp_path / "c.safetensors", {"a": torch.zeros(1)}, {"format": FORMAT})
    with pytest.raises(FileFormatError, match="does not fit the demo world"):
        load_classifier(tmp_path / "c.safetensors")
