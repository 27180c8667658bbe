"""Training references: within the recipe's ranges, white around the subject, a function of the generator alone."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dreamcache_core.data import augmentation
from dreamcache_core.data.augmentation import Alterations, augment_reference
from dreamcache_core.errors import InputError

SIZE = 64
COUNT = 400


def subject_on_blue(height: int = 30, width: int = 60) -> tuple[Tensor, Tensor]:
    """A rectangle, dark red on its left and dark green on its right half, in a wider image of blue."""
    image, mask = torch.zeros(1, 90, 150, 3), torch.zeros(1, 90, 150)
    image[..., 2] = 1
    box = (0, slice(20, 20 + height), slice(40, 40 + width))
    image[box] = torch.tensor([0.5, 0.0, 0.0])
    image[0, 20 : 20 + height, 40 + width // 2 : 40 + width] = torch.tensor([0.0, 0.5, 0.0])
    mask[box] = 1
    return image, mask


def reference(seed: int, **options) -> Tensor:
    image, mask = subject_on_blue(**options)
    generator = torch.Generator().manual_seed(seed)
    return augment_reference(image, mask, size=SIZE, generator=generator)


def references(count: int = COUNT) -> Iterator[Tensor]:
    return (reference(seed) for seed in range(count))


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Let but one of the random changes happen, always."""

    def choose(**probabilities: float) -> None:
        for name in ("FLIP", "JITTER", "ERASE"):
            monkeypatch.setattr(
                augmentation, f"{name}_PROBABILITY", probabilities.get(name.lower(), 0.0)
            )

    return choose


def box_of(image: Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what is not white, ends exclusive."""
    subject = (image[0] < 1).any(-1)
    rows, columns = subject.any(1).nonzero().flatten(), subject.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def test_same_seed_gives_the_same_reference_whatever_the_global_state():
    torch.manual_seed(1)
    first = reference(7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(reference(7), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(reference(8), first)
    assert first.shape == (1, SIZE, SIZE, 3)
    assert first.dtype == torch.float32


def test_longer_side_fills_70_to_100_percent_at_any_place(only):
    only()
    sides, tops, lefts = set[int](), set[float](), set[float]()
    for image in references():
        top, bottom, left, right = box_of(image)
        height, width = bottom - top, right - left
        sides.add(width)
        assert height == pytest.approx(width / 2, abs=1)
        tops.add(top / (SIZE - height))
        lefts.add(left / max(1, SIZE - width))
    assert min(sides) == math.ceil(0.7 * SIZE)
    assert max(sides) == SIZE
    for places in (tops, lefts):
        assert min(places) == 0
        assert max(places) == 1
        assert len(places) > 10


def test_colours_are_the_subjects_and_all_else_is_white(only):
    only()
    for image in references(20):
        top, bottom, left, right = box_of(image)
        middle = (left + right) // 2
        assert (
            image[0, top:bottom, left : middle - 3].sub(torch.tensor([0.5, 0, 0])).abs().max()
            < 0.05
        )
        assert (
            image[0, top:bottom, middle + 3 : right].sub(torch.tensor([0, 0.5, 0])).abs().max()
            < 0.05
        )
        white = image.clone()
        white[0, top:bottom, left:right] = 1
        assert bool((white == 1).all())


def is_flipped(image: Tensor) -> bool:
    _, _, left, right = box_of(image)
    columns = image[0, :, left : (left + right) // 2]
    return bool(columns[..., 1].sum() > columns[..., 0].sum())


def test_half_are_flipped(only):
    only(flip=0.5)
    share = sum(is_flipped(image) for image in references()) / COUNT
    assert share == pytest.approx(0.5, abs=0.08)


def test_flip_mirrors_colour_and_opacity(only):
    image, mask = subject_on_blue()
    mask[0, 20:35, 40:50] = 0  # the upper left corner is not the subject's
    results: list[Tensor] = []
    for flip in (0.0, 1.0):
        only(flip=flip)
        augmented = augment_reference(
            image, mask, size=SIZE, generator=torch.Generator().manual_seed(3)
        )
        top, bottom, left, right = box_of(augmented)
        results.append(augmented[0, top:bottom, left:right])
    assert torch.equal(results[0].flip(1), results[1])


def test_a_tenth_is_jittered_within_the_ranges_and_white_stays_white(only):
    only(jitter=0.1)
    num_jittered = 0
    for image in references():
        top, bottom, left, right = box_of(image)
        colour = image[0, (top + bottom) // 2, left + 3]
        if float(colour.sub(torch.tensor([0.5, 0.0, 0.0])).abs().max()) > 1 / 255:
            num_jittered += 1
        # brightness and contrast, each by at most 20 %, about a mean below 0.5
        assert 0.5 * 0.8 * 0.8 - 0.01 <= float(colour.max()) <= 0.5 * 1.2 * 1.2 + 0.01
        white = image.clone()
        white[0, top:bottom, left:right] = 1
        assert bool((white == 1).all())
    assert num_jittered / COUNT == pytest.approx(0.1, abs=0.04)


def test_jitter_leaves_soft_edges_between_subject_and_white(only):
    only(jitter=1.0)
    image, mask = subject_on_blue()
    mask = mask * 0.5
    for seed in range(20):
        augmented = augment_reference(
            image, mask, size=SIZE, generator=torch.Generator().manual_seed(seed)
        )
        assert float(augmented.min()) >= 0.5 - 1e-6  # half of it is white
        assert float(augmented.max()) == 1


def hue_of(colour: Tensor) -> float:
    red, green, blue = (float(value) for value in colour)
    return math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)


def test_hue_shifts_by_at_most_a_twentieth_turn_both_ways(only):
    only(jitter=1.0)
    hues: list[float] = []
    for image in references(100):
        top, bottom, left, _ = box_of(image)
        hues.append(hue_of(image[0, (top + bottom) // 2, left + 3]))
    assert -0.055 < min(hues) < -0.03
    assert 0.03 < max(hues) < 0.055


def test_two_fifths_lose_a_white_rectangle_of_2_to_25_percent(only, monkeypatch):
    only(erase=0.4)
    monkeypatch.setattr(augmentation, "FILL", (1.0, 1.0))
    image = torch.zeros(1, 40, 40, 3)
    shares: list[float] = []
    aspects: list[float] = []
    for seed in range(COUNT):
        augmented = augment_reference(
            image, None, size=SIZE, generator=torch.Generator().manual_seed(seed)
        )
        hole = (augmented[0] == 1).all(-1)
        if hole.any():
            rows, columns = hole.any(1).sum(), hole.any(0).sum()
            assert hole.sum() == rows * columns
            shares.append(float(hole.float().mean()))
            aspects.append(float(rows / columns))
    assert len(shares) / COUNT == pytest.approx(0.4, abs=0.08)
    assert 0.017 <= min(shares) < 0.04
    assert 0.23 < max(shares) <= 0.26
    assert 0.27 <= min(aspects) < 0.4
    assert 2.6 < max(aspects) <= 3.6


def test_without_mask_the_whole_image_is_the_subject(only):
    only()
    image, _ = subject_on_blue()
    generator = torch.Generator().manual_seed(0)
    top, bottom, left, right = box_of(
        augment_reference(image, None, size=SIZE, generator=generator)
    )
    assert (bottom - top) / (right - left) == pytest.approx(90 / 150, abs=0.03)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 90, 150), "an empty one"),
        (torch.ones(1, 150, 90), "aspect"),
    ],
)
def test_unfit_masks_are_refused(mask: Tensor, message: str):
    image, _ = subject_on_blue()
    with pytest.raises(InputError, match=message):
        augment_reference(image, mask, size=SIZE, generator=torch.Generator())


def test_batches_and_odd_sizes_are_refused():
    image, mask = subject_on_blue()
    with pytest.raises(InputError, match="one image, got a batch of 2"):
        augment_reference(image.repeat(2, 1, 1, 1), mask, size=SIZE, generator=torch.Generator())
    with pytest.raises(InputError, match="multiple of 8"):
        augment_reference(image, mask, size=100, generator=torch.Generator())


def altered(seed: int, **alterations: bool) -> Tensor:
    image, mask = subject_on_blue()
    return augment_reference(
        image,
        mask,
        size=SIZE,
        generator=torch.Generator().manual_seed(seed),
        alterations=Alterations(**alterations),
    )


def test_left_out_alterations_never_happen():
    for seed in range(100):
        image = altered(seed, flip=False, jitter=False, erase=False)
        top, bottom, left, right = box_of(image)
        assert not is_flipped(image)
        assert float(image[0, (top + bottom) // 2, left + 3, 0]) == pytest.approx(0.5, abs=0.01)
        size = right - left
        assert bottom - top == pytest.approx(size / 2, abs=1)
        assert float((image[0, top:bottom, left:right] < 1).any(-1).float().mean()) == 1.0


@pytest.mark.parametrize("name", ["flip", "jitter", "erase"])
def test_leaving_one_out_leaves_the_rest(name: str):
    differ = 0
    for seed in range(60):
        with_all, without = reference(seed), altered(seed, **{name: False})
        if name != "erase":  # what is white stays where it is: place, and what is erased
            assert box_of(with_all) == box_of(without)
        else:
            assert torch.equal(with_all[with_all < 1], without[with_all < 1])
        differ += not torch.equal(with_all, without)
        others = {other: False for other in ("flip", "jitter", "erase") if other != name}
        if torch.equal(
            altered(seed, **others), altered(seed, flip=False, jitter=False, erase=False)
        ):
            assert torch.equal(with_all, without)
    assert 0 < differ < 60
