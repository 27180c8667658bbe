"""The held-out triples that the demo's evidence is gathered on."""

import numpy as np
import pytest
from PIL import Image

from dreamcache_core.demo.measures.match import measure_match
from dreamcache_core.demo.world.patterns import PATTERNS
from dreamcache_core.demo.world.shapes import UNSEEN_SHAPES
from dreamcache_core.demo.world.world import SCENE_BACKGROUNDS, is_unseen_combination
from dreamcache_core.errors import InputError
from research.evidence.triples import GROUPS, SEEN_SHAPES, draw_triples


def are_equal(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


def test_there_are_enough_triples_and_each_is_another() -> None:
    triples = draw_triples()
    combinations = [triple for triple in triples if triple.group == "combination"]
    assert len(combinations) >= 400
    assert len({triple.seed for triple in triples}) == len(triples)
    assert len({triple.subject for triple in triples}) == len(triples)


def test_subjects_of_the_first_group_are_new_by_combination_alone() -> None:
    for triple in draw_triples(combinations=60, shapes=0):
        assert triple.subject.shape in SEEN_SHAPES
        assert is_unseen_combination(triple.subject.pattern, triple.subject.kinds)


def test_subjects_of_the_second_group_have_unseen_shapes_in_turn() -> None:
    triples = draw_triples(combinations=0, shapes=6)
    assert [triple.subject.shape for triple in triples] == [*UNSEEN_SHAPES] * 3
    assert {triple.group for triple in triples} == {"shape"}


def test_shapes_backgrounds_and_patterns_all_occur() -> None:
    triples = draw_triples()
    for group in GROUPS:
        members = [triple for triple in triples if triple.group == group]
        assert {triple.scene.background for triple in members} == set(SCENE_BACKGROUNDS)
        assert {triple.subject.pattern for triple in members} == set(PATTERNS)
    counts = [sum(t.subject.shape == shape for t in triples) for shape in SEEN_SHAPES]
    assert set(counts) == {30}


def test_prompts_name_the_shape_and_neither_pattern_nor_colour() -> None:
    for triple in draw_triples():
        words = triple.prompt.replace(",", "").split()
        assert triple.subject.shape in words
        assert not {pattern.word for pattern in PATTERNS.values()} & set(words)


def test_the_list_is_decided_by_its_seed() -> None:
    assert draw_triples(3, 5, 5) == draw_triples(3, 5, 5)
    assert draw_triples(3, 5, 5)[0] != draw_triples(4, 5, 5)[0]


def test_a_shorter_list_is_the_beginning_of_a_longer_one() -> None:
    assert draw_triples(0, 5, 0) == draw_triples(0, 9, 0)[:5]
    assert draw_triples(0, 0, 5) == draw_triples(0, 3, 9)[3:8]


def test_the_groups_do_not_repeat_each_other() -> None:
    first, second = draw_triples(0, 1, 1)
    assert first.seed != second.seed
    assert not are_equal(first.true_image(), second.true_image())


def test_images_of_a_triple_are_always_the_same_ones() -> None:
    triple = draw_triples(0, 1, 0)[0]
    for draw in (triple.reference, triple.true_image, triple.other_image):
        assert draw().size == (128, 128)
        assert are_equal(draw(), draw())


def test_references_show_the_subject_in_several_poses_on_white() -> None:
    triple = draw_triples(0, 1, 0)[0]
    images = [np.asarray(triple.reference(number)) for number in range(3)]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])
    assert {tuple(image[0, 0].tolist()) for image in images} == {(255, 255, 255)}


def test_the_other_image_shows_another_subject() -> None:
    triple = draw_triples(0, 2, 0)[1]
    assert measure_match(triple.true_image(), triple.subject).match > 0.9
    assert measure_match(triple.other_image(), triple.subject).match < 0.5
    assert measure_match(triple.other_image(), triple.subject).is_found


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="from 0 on"):
        draw_triples(combinations=-1)
