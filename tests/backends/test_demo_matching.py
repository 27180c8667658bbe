"""The sheets of the blind test: every reference has its picture, and the answers say which."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamcache_core.errors import InputError
from dreamcache_core.evaluation import demo_matching
from dreamcache_core.evaluation.demo_matching import CELL_PX, MatchingOptions, draw_matching, main

torch.set_num_threads(1)

SHEET = torch.zeros(1, 8, 8, 3)


def test_sheets_hold_every_reference_and_the_answers_every_letter(tmp_path: Path):
    flags = ["--shapes", "mug", "star", "--subjects", "3", "--steps", "1"]
    assert main(["--out", str(tmp_path), *flags]) == 0
    answers = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert set(answers) == {"with_reference", "without_reference"}
    for name, by_shape in answers.items():
        assert list(by_shape) == ["mug", "star"]
        assert all(sorted(letters) == ["A", "B", "C"] for letters in by_shape.values())
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.width >= 3 * CELL_PX
            assert sheet.height >= 4 * CELL_PX


def test_both_sheets_show_the_same_references(tmp_path: Path):
    draw_matching(MatchingOptions(out=str(tmp_path), shapes=["mug"], subjects=2, steps=1))
    rows = []
    for name in ("with_reference", "without_reference"):
        with Image.open(tmp_path / f"{name}.png") as sheet:
            rows.append(np.asarray(sheet.crop((0, 0, sheet.width, CELL_PX))))
    assert np.array_equal(*rows)


def test_the_answers_say_which_reference_each_picture_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sheets = []
    monkeypatch.setattr(
        demo_matching, "contact_sheet", lambda rows, *_, **__: sheets.append(rows) or SHEET
    )
    monkeypatch.setattr(
        demo_matching,
        "generate_pictures",
        lambda pipeline, adapters, triples, *_, **__: np.stack(
            [np.asarray(triple.reference()) for triple in triples]
        ),
    )
    draw_matching(MatchingOptions(out=str(tmp_path), shapes=["mug"], subjects=5, steps=1))
    answers = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    for (references, pictures), by_shape in zip(sheets, answers.values(), strict=True):
        assert by_shape["mug"] != "ABCDE", "not shuffled"
        for picture, letter in zip(pictures, by_shape["mug"], strict=True):
            assert torch.equal(picture, references["ABCDE".index(letter)])


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="no shape 'dog'"):
        MatchingOptions(out="x", shapes=["dog"])
    with pytest.raises(InputError, match="must be in 2"):
        MatchingOptions(out="x", subjects=1)
