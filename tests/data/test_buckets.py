"""Sizes of targets: buckets of about one area, the nearest of them, and cropping without distortion."""

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dreamcache_core.data.buckets import aspect_buckets, crop_target, nearest_bucket, target_sizes
from dreamcache_core.data.sources.source import Pair
from dreamcache_core.errors import InputError
from dreamcache_core.images.reference import resize_smoothly


class Sizes:
    """A source that knows sizes alone."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes = sizes
        self.keys: Sequence[str] = [str(size) for size in sizes]
        self.problems: Sequence[str] = ()

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def stamp(self, index: int) -> str:
        return ""

    def files(self, index: int) -> tuple[str, ...]:
        return ()

    def caption(self, index: int) -> str:
        return ""

    def read(self, index: int) -> Pair:
        raise NotImplementedError


def ramp(height: int, width: int) -> Tensor:
    """Red falls from left to right, green from top to bottom."""
    image = torch.zeros(1, height, width, 3)
    image[..., 0] = torch.linspace(1, 0, width)
    image[..., 1] = torch.linspace(1, 0, height)[:, None]
    return image


def test_buckets_of_512_are_these():
    assert aspect_buckets(512) == (
        (704, 384),
        (640, 384),
        (576, 448),
        (512, 512),
        (448, 576),
        (384, 640),
        (384, 704),
    )


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
def test_buckets_hold_their_area_aspect_step_and_come_in_pairs(resolution: int):
    buckets = aspect_buckets(resolution)
    assert (resolution, resolution) in buckets
    assert {(w, h) for h, w in buckets} == set(buckets)
    for height, width in buckets:
        assert height % 64 == width % 64 == 0
        assert max(height, width) <= 2 * min(height, width)
        assert abs(height * width / resolution**2 - 1) < 0.11


def test_a_resolution_below_the_step_is_refused():
    with pytest.raises(InputError, match="resolution must be at least 64"):
        aspect_buckets(32)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (100, 100, (512, 512)),
        (3000, 2000, (640, 384)),
        (480, 640, (448, 576)),
        (10, 1000, (384, 704)),
        (1000, 10, (704, 384)),
    ],
)
def test_nearest_bucket_is_that_of_the_nearest_aspect(
    height: int, width: int, expected: tuple[int, int]
):
    assert nearest_bucket(height, width, aspect_buckets(512)) == expected


def test_target_sizes_are_squares_or_buckets():
    source = Sizes((480, 640), (90, 90))
    assert target_sizes(source, 512, has_buckets=False) == [(512, 512), (512, 512)]
    assert target_sizes(source, 512, has_buckets=True) == [(448, 576), (512, 512)]


@pytest.mark.parametrize("resolution", [0, 500])
def test_resolution_that_latents_cannot_have_is_refused(resolution: int):
    with pytest.raises(InputError, match="multiple of 8"):
        target_sizes(Sizes((8, 8)), resolution, has_buckets=False)


def test_crop_of_the_same_size_changes_nothing():
    image = torch.rand(2, 24, 40, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(crop_target(image, 24, 40), image)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(24, 24, slice(0, 24), slice(8, 32)), (12, 40, slice(6, 18), slice(0, 40))],
)
def test_crop_takes_the_centre(height: int, width: int, rows: slice, columns: slice):
    image = ramp(24, 40)
    assert torch.equal(crop_target(image, height, width), image[:, rows, columns])


def test_crop_covers_before_it_cuts():
    crop = crop_target(ramp(30, 80), 60, 60)  # twice as large, then 60 of 160 columns
    assert crop.shape == (1, 60, 60, 3)
    red, green = crop[0, :, :, 0].mean(0), crop[0, :, :, 1].mean(1)
    assert float(red[0]) == pytest.approx(1 - 50 / 160, abs=0.01)
    assert float(red[-1]) == pytest.approx(1 - 110 / 160, abs=0.01)
    assert float(green[0]) == pytest.approx(1, abs=0.02)
    assert float(green[-1]) == pytest.approx(0, abs=0.02)


def test_crop_shrinks_without_aliasing():
    stripes = torch.zeros(1, 64, 96, 3)
    stripes[:, :, ::2] = 1
    crop = crop_target(stripes, 16, 16)
    assert crop[:, :, 2:-2].sub(0.5).abs().max() < 0.05


@pytest.mark.parametrize("size", [(8, 60_000), (60_000, 8), (1, 4_000_000)])
@pytest.mark.parametrize("target", [(512, 512), (704, 384), (384, 704)])
def test_thin_image_is_cropped_before_it_is_scaled(size: tuple[int, int], target: tuple[int, int]):
    """Scaled whole, 60,000 x 8 pixels take 23 GB."""
    image = torch.rand(1, *size, 1).expand(-1, -1, -1, 3)
    start = time.process_time()
    assert crop_target(image, *target).shape == (1, *target, 3)
    assert time.process_time() - start < 5


def test_crop_of_a_thin_image_is_its_centre():
    image = torch.zeros(1, 10, 1001, 3)
    image[:, :, 490:511] = 1
    assert float(crop_target(image, 16, 16).min()) > 0.999


def test_images_of_ordinary_aspect_are_not_cropped_before():
    image = torch.rand(1, 40, 79, 3)
    whole = resize_smoothly(image.permute(0, 3, 1, 2), 64, 126).permute(0, 2, 3, 1)
    assert torch.equal(crop_target(image, 64, 64), whole[:, :, 31:95].clamp(0, 1))
