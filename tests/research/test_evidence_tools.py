"""What the demo's evidence needs besides numbers: its plots, and the command that trains its classifier."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.demo.measures.classifier import FORMAT
from dreamcache_core.evaluation.statistics import Interval
from dreamcache_core.files.tensor_file import read_tensor_file
from research.demo_model.train_classifier import ClassifierConfig, train
from research.evidence.plots import Bar, Sweep, SweepPoint, plot_bars, plot_pareto

pytestmark = pytest.mark.diffusers


def around(value: float) -> Interval:
    return Interval(value, value - 0.02, value + 0.03)


SWEEPS = [
    Sweep(
        "image guidance",
        [
            SweepPoint(f"scale {i}", around(0.95 - 0.02 * i), around(0.3 + 0.1 * i), i == 3)
            for i in range(6)
        ],
    ),
    Sweep("joint", [SweepPoint("joint 3", around(0.9), around(0.5))]),
]
GROUPS = {
    "timestep": [Bar("1", around(0.7), is_chosen=True), Bar("600", around(0.4))],
    "merge": [Bar("concat", around(0.7), is_chosen=True), Bar("sum", around(0.6))],
}


def test_the_pareto_plot_names_every_point_and_sweep(tmp_path: Path) -> None:
    plot_pareto(SWEEPS, tmp_path / "p.svg", title="demo")
    drawn = (tmp_path / "p.svg").read_text(encoding="utf-8")
    for text in ("scale 0", "scale 5", "joint 3", "image guidance", "scene obedience", "demo"):
        assert f"<!-- {text}" in drawn, text


def test_the_bars_name_every_variant_and_group(tmp_path: Path) -> None:
    plot_bars(GROUPS, tmp_path / "b.svg")
    drawn = (tmp_path / "b.svg").read_text(encoding="utf-8")
    for text in ("timestep", "merge", "600", "concat", "sum", "subject match"):
        assert f"<!-- {text} -->" in drawn, text


def test_only_the_chosen_point_has_a_star(tmp_path: Path) -> None:
    plain = [Sweep("a", [SweepPoint("x", around(0.9), around(0.5))])]
    starred = [Sweep("a", [SweepPoint("x", around(0.9), around(0.5), is_chosen=True)])]
    plot_pareto(plain, tmp_path / "plain.svg")
    plot_pareto(starred, tmp_path / "starred.svg")
    assert (tmp_path / "plain.svg").read_bytes() != (tmp_path / "starred.svg").read_bytes()


def test_a_line_joins_the_points_of_a_sweep_but_not_those_that_only_stand_together(tmp_path: Path):
    points = [SweepPoint("x", around(0.9), around(0.5)), SweepPoint("y", around(0.8), around(0.6))]
    plot_pareto([Sweep("a", points)], tmp_path / "joined.svg")
    plot_pareto([Sweep("a", points, is_joined=False)], tmp_path / "apart.svg")
    joined, apart = ((tmp_path / f"{n}.svg").read_text() for n in ("joined", "apart"))
    assert joined.count("<path") > apart.count("<path")
    assert apart.count("<use") == joined.count("<use")


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file in files:
        plot_pareto(SWEEPS, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_plot_is_an_image_with_colours(tmp_path: Path) -> None:
    plot_bars(GROUPS, tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # matplotlib's first two colours: other variants, and the chosen ones
    assert (pixels == (31, 119, 180)).all(axis=1).sum() > 500
    assert (pixels == (255, 127, 14)).all(axis=1).sum() > 500


def test_the_command_trains_and_writes_a_classifier(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    flags = ["--out", str(file), "--images", "24", "--held_out", "8", "--steps", "3"]
    train(parse_config(ClassifierConfig, [*flags, "--batch", "8"], program="classifier"))
    _, metadata = read_tensor_file(file, FORMAT)
    assert metadata["steps"] == "3"
    assert 0.0 <= float(metadata["shape_accuracy"]) <= 1.0
    assert "out" not in metadata
