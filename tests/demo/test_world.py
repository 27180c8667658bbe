"""The demo world: what is drawn, what captions say, and what adapter training never sees."""

import json
import re

import numpy as np
import pytest

from dreamcache_core.demo.files import demo_folder
from dreamcache_core.demo.world.backgrounds import BACKGROUNDS
from dreamcache_core.demo.world.patterns import PATTERNS
from dreamcache_core.demo.world.shapes import SHAPES, UNSEEN_SHAPES
from dreamcache_core.demo.world.world import (
    IMAGE_SIZE,
    OUTLINE,
    PALETTE,
    Pose,
    Scene,
    Subject,
    draw_known_subject,
    draw_pose,
    draw_scene,
    draw_subject,
    draw_training_image,
    is_unseen_combination,
    render,
    render_cutout,
    subject_masks,
    write_caption,
)
from research.demo_model.image_pool import draw_twin_poses

COLOUR_WORDS = (
    "red orange yellow lime green teal blue violet purple magenta pink brown white black grey gray"
)
UPRIGHT = Pose(0.5, 0.5, 0.4)
HALVES = Subject("ball", "halves", ((200, 0, 0), (0, 0, 200)), (0, 7))


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def draw_scene_image(seed: int) -> np.ndarray:
    source = random(seed)
    subject, scene = draw_subject(source), draw_scene(source)
    return np.asarray(render(subject, scene, draw_pose(source, scene), source))


def test_world_is_as_large_as_the_demo_promises():
    assert len(SHAPES) >= 12
    assert len(BACKGROUNDS) >= 8
    assert len(UNSEEN_SHAPES) == 2
    assert set(UNSEEN_SHAPES) < set(SHAPES)


def test_same_seed_draws_the_same_image_and_another_seed_another():
    assert np.array_equal(draw_scene_image(3), draw_scene_image(3))
    assert not np.array_equal(draw_scene_image(3), draw_scene_image(4))


def test_captions_name_the_shape_and_never_a_colour():
    source = random()
    for _ in range(500):
        subject, scene = draw_subject(source), draw_scene(source, list(BACKGROUNDS))
        words = re.findall(r"[a-z]+", write_caption(subject, scene, source))
        assert subject.shape in words
        named = set(words) & set(COLOUR_WORDS.split())
        assert named <= ({"white"} if scene.background == "paper" else set())


def test_caption_reads_as_english():
    subject = Subject("umbrella", "solid", ((0, 0, 0),), (0,))
    captions = {
        write_caption(subject, Scene("grass", place="left"), random(seed), False)
        for seed in range(40)
    }
    assert "an umbrella on the grass, left" in captions
    assert "a picture of an umbrella in a meadow, on the left" in captions


def test_every_word_of_a_caption_is_a_token_that_the_shipped_model_has_learnt():
    vocabulary = (demo_folder() / "model" / "tokenizer" / "vocab.json").read_text(encoding="utf-8")
    source = random()
    words: set[str] = set()
    for _ in range(2000):
        subject, scene = draw_subject(source), draw_scene(source, list(BACKGROUNDS))
        words.update(re.findall(r"[a-z]+", write_caption(subject, scene, source)))
    assert {f"{word}</w>" for word in words} <= set(json.loads(vocabulary))


def test_caption_of_twins_keeps_the_shape_in_the_singular():
    subject = Subject("mug", "stripes", ((0, 0, 0), (9, 9, 9)), (0, 1))
    captions = {
        write_caption(subject, Scene("grass", has_twin=True), random(seed)) for seed in range(40)
    }
    assert "a striped mug and its twin on the grass" in captions
    assert all(" and its twin " in caption for caption in captions)


def test_twins_stand_apart_and_look_alike():
    source = random()
    for _ in range(20):
        left, right = draw_twin_poses(source)
        masks = [subject_masks(HALVES, pose)[0] for pose in (left, right)]
        assert not (masks[0] & masks[1]).any()
        twins = np.asarray(render(HALVES, Scene("paper"), left, random(), right))
        for pose, mask in zip((left, right), masks, strict=True):
            alone = np.asarray(render(HALVES, Scene("paper"), pose, random()))
            assert np.array_equal(twins[mask], alone[mask])


def test_pattern_is_named_only_on_request():
    striped = Subject("mug", "stripes", ((0, 0, 0), (9, 9, 9)), (0, 1))
    assert "striped mug" in write_caption(striped, Scene("grass"), random(), name_pattern=True)
    assert "striped" not in write_caption(striped, Scene("grass"), random(), name_pattern=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fits_its_square_and_fills_it(shape: str):
    whole, inner = subject_masks(Subject(shape, "solid", ((0, 0, 0),), (0,)), UPRIGHT)
    rows, columns = np.nonzero(whole)
    edges = np.array(
        [rows.min(), columns.min(), IMAGE_SIZE - 1 - rows.max(), IMAGE_SIZE - 1 - columns.max()]
    )
    assert (edges >= 0.1 * IMAGE_SIZE - 4).all(), "beyond its square"
    assert edges.min() <= 0.1 * IMAGE_SIZE + 4, "does not reach its square's border"
    assert not (inner & ~whole).any()
    assert inner.mean() > 0.1


def test_halves_show_the_first_colour_left_and_the_second_right_and_flipping_exchanges_them():
    image = np.asarray(render(HALVES, Scene("paper"), UPRIGHT, random()))
    flipped = np.asarray(
        render(HALVES, Scene("paper"), Pose(0.5, 0.5, 0.4, flipped=True), random())
    )
    left, right = (64, 40), (64, 88)
    assert image[left].tolist() == flipped[right].tolist() == [200, 0, 0]
    assert image[right].tolist() == flipped[left].tolist() == [0, 0, 200]


def test_a_quarter_turn_clockwise_takes_the_left_half_to_the_top():
    image = np.asarray(render(HALVES, Scene("paper"), Pose(0.5, 0.5, 0.4, angle=90), random()))
    assert image[40, 64].tolist() == [200, 0, 0]
    assert image[88, 64].tolist() == [0, 0, 200]


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_uses_each_of_its_colours_and_no_other(name: str):
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    for count in PATTERNS[name].colours:
        assert set(np.unique(PATTERNS[name].draw(x, y, count))) == set(range(count))


def test_reference_shows_the_subject_on_white_filling_most_of_the_square():
    source = random(5)
    for _ in range(20):
        image = np.asarray(render_cutout(draw_subject(source), source).convert("RGB"))
        rows, columns = np.nonzero((image != 255).any(axis=2))
        assert (image[0] == 255).all()
        assert (image[-1] == 255).all()
        assert max(np.ptp(rows), np.ptp(columns)) > 0.6 * IMAGE_SIZE


def test_alpha_channel_of_a_cutout_covers_the_subject_and_nothing_else():
    cutout = np.asarray(render_cutout(draw_subject(random(1)), random(2)))
    assert (cutout[..., :3][cutout[..., 3] == 0] == 255).all()
    assert 0.1 < (cutout[..., 3] == 255).mean() < 0.8


def test_place_and_size_of_a_scene_decide_where_the_subject_is():
    source = random()
    poses = {
        place: draw_pose(source, Scene("grass", place=place))
        for place in ("left", "right", "top", "bottom")
    }
    assert poses["left"].x < 0.4 < 0.6 < poses["right"].x
    assert poses["top"].y < 0.4 < 0.6 < poses["bottom"].y
    sizes = [
        draw_pose(source, Scene("grass", size=size)).half_size for size in ("tiny", "", "large")
    ]
    assert sizes == sorted(sizes)


def test_unseen_combinations_do_not_depend_on_the_order_of_colours_and_are_an_eighth():
    assert is_unseen_combination("dots", (3, 9)) == is_unseen_combination("dots", (9, 3))
    pairs = [(a, b) for a in range(len(PALETTE)) for b in range(a)]
    unseen = [is_unseen_combination(name, pair) for name in PATTERNS for pair in pairs]
    assert 0.09 < np.mean(unseen) < 0.16


def test_adapter_training_meets_no_unseen_subject():
    source = random()
    known = [draw_known_subject(source) for _ in range(400)]
    assert not any(subject.is_unseen for subject in known)
    assert any(draw_subject(source).is_unseen for _ in range(100))


def test_training_image_marks_its_subject_and_its_caption_names_the_shape():
    for seed in range(20):
        image, caption = draw_training_image(random(seed), "mug")
        pixels = np.asarray(image).astype(int)
        shown = pixels[..., 3] > 127
        assert 0.03 < shown.mean() < 0.5
        outline = np.abs(pixels[..., :3] - OUTLINE).max(axis=-1) < 40
        assert outline[shown].any()
        assert "mug" in caption
        assert not any(pattern.word in caption.split() for pattern in PATTERNS.values())
