"""From scores to tables, against numbers worked out by hand."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamcache_core.evaluation.dreambench.dataset import Photo, Subject
from dreamcache_core.evaluation.dreambench.prompts import SubjectEntry
from dreamcache_core.evaluation.dreambench.results import (
    estimate_mean,
    overall_lines,
    summarise,
    write_tables,
)
from dreamcache_core.evaluation.dreambench.scores import ImageScore, ScoreLog
from dreamcache_core.evaluation.image_metrics import cosine_similarity
from dreamcache_core.evaluation.statistics import Interval


def subject(name: str, is_live: bool) -> Subject:
    photo = Photo(Path("00.jpg"), None)
    entry = SubjectEntry(name, name, is_live)
    return Subject(0, entry, ("a",), (photo,), photo)


def score(name: str, dino: float, **changes: Any) -> ImageScore:
    values: dict[str, Any] = {
        "image": f"{name}/00_0.png",
        "subject": name,
        "prompt_number": 0,
        "repeat": 0,
        "prompt": "a, b",
        "fingerprint": f"{name}{dino}",
        "dino": dino,
        "clip_i": dino / 2,
        "clip_t": 0.25,
        "masked_dino": None,
        "masked_clip_i": None,
        **changes,
    }
    return ImageScore(**values)


SUBJECTS = [subject("mug", False), subject("dog", True), subject("cat", True)]
SCORES = [
    score("mug", 0.2),
    score("mug", 0.4, masked_dino=0.9, masked_clip_i=0.7),
    score("dog", 0.6),
    score("dog", 1.0, prompt_number=None, repeat=None, prompt=None, clip_t=None),
]


def test_cosine_similarity_of_a_3_4_5_triangle() -> None:
    one = torch.tensor([[3.0, 4.0], [-2.0, 0.0]])
    other = torch.tensor([[1.0, 0.0], [0.0, 7.0], [6.0, 8.0]])
    expected = torch.tensor([[0.6, 0.8, 1.0], [-1.0, 0.0, -0.6]])
    torch.testing.assert_close(cosine_similarity(one, other), expected)


def test_the_overall_score_is_the_mean_over_subjects_not_over_images() -> None:
    results = summarise(SCORES, SUBJECTS)
    rows = {row.name: row for row in results.overall}
    assert rows["all subjects"].metrics["dino"].value == pytest.approx((0.3 + 0.6) / 2)
    assert rows["all subjects"].metrics["clip_i"].value == pytest.approx(0.225)
    assert (rows["all subjects"].num_subjects, rows["all subjects"].num_images) == (2, 3)
    assert rows["objects"].metrics["dino"].value == pytest.approx(0.3)
    assert rows["live subjects"].metrics["dino"].value == pytest.approx(0.6)


def test_real_images_make_a_row_of_their_own() -> None:
    row = summarise(SCORES, SUBJECTS).overall[-1]
    assert (row.name, row.num_images) == ("real images", 1)
    assert row.metrics["dino"] == Interval(1.0)
    assert "clip_t" not in row.metrics


def test_masked_scores_count_where_there_are_masks() -> None:
    results = summarise(SCORES, SUBJECTS)
    assert results.overall[0].metrics["masked_dino"] == Interval(0.9)
    assert [row.name for row in results.subjects] == ["mug", "dog"]
    assert results.subjects[0].metrics["masked_clip_i"].value == 0.7
    assert "masked_dino" not in results.subjects[1].metrics


def test_the_interval_of_two_equal_halves_is_that_of_the_binomial() -> None:
    # the mean of n draws from {0, 1} in equal parts: 0.5 +- 1.96 * 0.5 / sqrt(n)
    found = estimate_mean([0.0, 1.0] * 50)
    half = 1.96 * 0.5 / math.sqrt(100)
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - half, abs=0.011)
    assert found.high == pytest.approx(0.5 + half, abs=0.011)
    assert estimate_mean([0.0, 1.0] * 50) == found


def test_equal_values_have_no_spread_and_one_value_has_no_interval() -> None:
    assert estimate_mean([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    assert estimate_mean([0.5]) == Interval(0.5)
    assert str(Interval(0.7668, 0.741, 0.79)) == "0.767 [0.741, 0.790]"
    assert str(Interval(0.5)) == "0.500"


def test_tables_are_written_as_csv(tmp_path: Path) -> None:
    results = summarise(SCORES, SUBJECTS)
    write_tables(tmp_path, results, SCORES)

    def read(name: str) -> list[dict[str, str]]:
        with (tmp_path / name).open(newline="") as stream:
            return list(csv.DictReader(stream))

    assert read("subjects.csv")[0] == {
        "name": "mug",
        "subjects": "1",
        "images": "2",
        "dino": "0.30000000000000004",
        "clip_i": "0.15000000000000002",
        "clip_t": "0.25",
        "masked_dino": "0.9",
        "masked_clip_i": "0.7",
    }
    overall = read("overall.csv")[0]
    assert float(overall["dino_low"]) == pytest.approx(0.3)
    assert float(overall["dino_high"]) == pytest.approx(0.6)
    images = read("images.csv")
    assert (images[0]["prompt"], images[0]["masked_dino"]) == ("a, b", "")
    assert len(images) == 4


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t"])
def test_cells_that_a_spreadsheet_would_run_are_marked_as_text(tmp_path: Path, start: str) -> None:
    name, prompt = f"{start}HYPERLINK(1)", f"{start}1+1"
    scores = [score(name, -0.5, prompt=prompt)]
    write_tables(tmp_path, summarise(scores, [subject(name, False)]), scores)
    with (tmp_path / "images.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["subject"], row["prompt"], row["dino"]) == (f"'{name}", f"'{prompt}", "-0.5")
    with (tmp_path / "subjects.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["name"] == f"'{name}"


def test_lines_for_people_name_groups_and_metrics() -> None:
    lines = list(overall_lines(summarise(SCORES, SUBJECTS)))
    assert lines[1] == (
        "objects (1 subjects, 2 images): DINO 0.300, CLIP-I 0.150, CLIP-T 0.250, masked DINO 0.900, "
        "masked CLIP-I 0.700"
    )


def test_the_log_joins_processes_and_survives_a_line_cut_short(tmp_path: Path) -> None:
    first, second = ScoreLog(tmp_path, 0), ScoreLog(tmp_path, 1)
    first.append(SCORES[:1])
    second.append(SCORES[1:2])
    file = tmp_path / "scores-00000.jsonl"
    file.write_text(file.read_text() + '{"image": "mug/0')
    assert list(first.read().values()) == SCORES[:2]
    first.append(SCORES[2:3])
    assert sorted(score.dino for score in second.read().values()) == [0.2, 0.4, 0.6]
