"""Measuring subjects of the demo world in images: where, in which colours, with which pattern."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreamcache_core.demo.measures.colours import srgb_to_lab
from dreamcache_core.demo.measures.location import locate_subject
from dreamcache_core.demo.measures.match import WORST_COLOUR_ERROR, measure_match
from dreamcache_core.demo.world.backgrounds import paint_background
from dreamcache_core.demo.world.world import (
    SCENE_BACKGROUNDS,
    Pose,
    Scene,
    Subject,
    render,
    subject_masks,
)
from dreamcache_core.errors import InputError
from research.evidence.triples import draw_triples
from research.evidence.truths import measure_bounds

RED, BLUE, GREEN = (214, 40, 40), (40, 80, 205), (30, 130, 60)
MUG = Subject("mug", "stripes", (RED, BLUE), (0, 7))
BEACH, GRASS = Scene("beach", place="left"), Scene("grass")
LEFT, MIDDLE = Pose(0.27, 0.53, 0.26, 8.0, True), Pose(0.5, 0.53, 0.26, -6.0)


def drawn(subject: Subject, scene: Scene = GRASS, pose: Pose = MIDDLE) -> Image.Image:
    return render(subject, scene, pose, np.random.default_rng(1))


def in_colours(*colours: tuple[int, int, int], pattern: str = "stripes") -> Subject:
    return dataclasses.replace(MUG, pattern=pattern, colours=colours)


@pytest.mark.parametrize(
    ("colour", "lab"),
    [
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        # published values of sRGB's primaries and of middle grey
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0.0, 0.0)),
    ],
)
def test_lab_agrees_with_published_values(
    colour: tuple[int, int, int], lab: tuple[float, float, float]
) -> None:
    assert srgb_to_lab(np.array(colour)) == pytest.approx(np.array(lab), abs=0.01)


def test_lab_keeps_the_axes_before_the_colour() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (2, 5, 3), dtype=np.uint8)
    assert srgb_to_lab(colours)[1, 4] == pytest.approx(srgb_to_lab(colours[1, 4]))


@pytest.mark.parametrize("shape", ["ball", "mug", "cat", "boat"])
@pytest.mark.parametrize("scene", [GRASS, Scene("night", size="large"), Scene("kitchen")])
def test_a_subject_is_found_where_it_was_drawn(shape: str, scene: Scene) -> None:
    subject = Subject(shape, "halves", (GREEN, BLUE), (4, 7))
    pose = Pose(0.45, 0.6, 0.3, 9.0, True)
    found = locate_subject(np.asarray(drawn(subject, scene, pose)), shape)
    assert found.is_found
    true, fitted = (subject_masks(subject, each)[0] for each in (pose, found.pose))
    assert (true & fitted).sum() / (true | fitted).sum() > 0.8


@pytest.mark.parametrize("scene", [GRASS, BEACH])
def test_the_same_subject_elsewhere_in_another_pose_matches(scene: Scene) -> None:
    found = measure_match(drawn(MUG, scene, LEFT), MUG)
    assert found.colour_error < 8.0
    assert found.pattern_agreement > 0.8
    assert found.match > 0.85


def test_an_array_gives_what_the_image_gives() -> None:
    image = drawn(MUG)
    assert measure_match(np.asarray(image), MUG) == measure_match(image, MUG)


def test_the_colour_error_of_a_solid_subject_is_the_distance_of_the_colours() -> None:
    red, blue = in_colours(RED, pattern="solid"), in_colours(BLUE, pattern="solid")
    distance = np.linalg.norm(np.subtract(*srgb_to_lab(np.array([RED, BLUE]))))
    assert measure_match(drawn(blue), red).colour_error == pytest.approx(distance, abs=1.0)


def test_one_wrong_colour_of_two_costs_its_share_of_the_area() -> None:
    half, wrong = in_colours(RED, BLUE), in_colours(RED, GREEN)
    distance = np.linalg.norm(np.subtract(*srgb_to_lab(np.array([BLUE, GREEN]))))
    error = measure_match(drawn(wrong), half).colour_error
    assert 0.35 * distance < error < 0.65 * distance


def test_the_colour_error_does_not_see_which_way_colours_are_arranged() -> None:
    assert measure_match(drawn(in_colours(RED, BLUE, pattern="bars")), MUG).colour_error < 25.0


def test_the_match_falls_steadily_as_colours_go_astray() -> None:
    matches = [
        measure_match(drawn(in_colours((214 - 40 * i, 40 + 40 * i, 40), BLUE)), MUG).match
        for i in range(5)
    ]
    assert matches == sorted(matches, reverse=True)
    assert matches[0] - matches[-1] > 0.2


def test_the_pattern_agreement_is_blind_to_colours_and_sees_the_pattern() -> None:
    other_colours = measure_match(drawn(in_colours(GREEN, (250, 215, 50))), MUG)
    other_pattern = measure_match(drawn(in_colours(RED, BLUE, pattern="bars")), MUG)
    no_pattern = measure_match(drawn(in_colours(RED, pattern="solid")), MUG)
    assert other_colours.pattern_agreement > 0.8
    assert other_colours.colour_error > 40.0
    assert other_pattern.pattern_agreement < 0.4
    assert no_pattern.pattern_agreement < 0.2


def test_stripes_on_a_plain_subject_are_no_agreement() -> None:
    assert measure_match(drawn(MUG), in_colours(RED, pattern="solid")).pattern_agreement < 0.2


def test_the_match_is_the_mean_of_its_halves() -> None:
    found = measure_match(drawn(in_colours((250, 165, 195), BLUE)), MUG)
    assert 5.0 < found.colour_error < WORST_COLOUR_ERROR
    assert found.colour_score == pytest.approx(1 - found.colour_error / WORST_COLOUR_ERROR)
    assert found.match == pytest.approx((found.colour_score + found.pattern_agreement) / 2)


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("pattern", ["solid", "stripes"])
def test_a_blank_image_matches_nobody(level: int, pattern: str) -> None:
    subject = in_colours((level, level, level), BLUE)
    if pattern == "solid":
        subject = in_colours((level, level, level), pattern="solid")
    blank = np.full((128, 128, 3), level, dtype=np.uint8)
    assert measure_match(blank, subject).match == 0.0


@pytest.mark.parametrize("background", SCENE_BACKGROUNDS)
def test_a_scene_without_a_subject_matches_nobody(background: str) -> None:
    empty = paint_background(background, 256, np.random.default_rng(3)).reduce(2)
    found = measure_match(empty, MUG)
    assert not found.is_found
    assert found.match == 0.0


def test_noise_matches_nobody() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert measure_match(noise, MUG).match < 0.3


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((128, 128), np.uint8),
        np.zeros((128, 128, 3), np.float32),
    ],
)
def test_what_is_no_image_of_the_world_is_refused(image: np.ndarray) -> None:
    with pytest.raises(InputError, match="8-bit array of shape"):
        measure_match(image, MUG)


@pytest.mark.parametrize("radius", [0.0, 1.0])
def test_right_and_wrong_images_separate_even_when_blurred(radius: float) -> None:
    bounds = measure_bounds(
        draw_triples(seed=5, combinations=16, shapes=4),
        lambda image: image.filter(ImageFilter.GaussianBlur(radius)),
    )
    assert bounds.separation(lambda found: found.match) > 0.99
    assert bounds.separation(lambda found: -found.colour_error) > 0.99
    upper, lower = (
        float(np.mean([found.match for found in side])) for side in (bounds.upper, bounds.lower)
    )
    assert upper > 0.8
    assert lower < 0.25


def test_separation_counts_pairs_and_half_of_the_ties() -> None:
    right = measure_match(drawn(MUG), MUG)
    low, middle, high = (
        dataclasses.replace(right, pattern_agreement=value) for value in (0.1, 0.5, 0.9)
    )
    bounds = dataclasses.replace(measure_bounds([]), upper=(middle, high), lower=(low, middle))
    assert bounds.separation(lambda found: found.pattern_agreement) == pytest.approx(3.5 / 4)
