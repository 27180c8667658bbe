"""The reference image: subject cut out, resized, centred on a plain square."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dreamcache_core.errors import InputError
from dreamcache_core.images.reference import (
    check_mask_aspect,
    prepare_reference_image,
    resize_mask,
)

RED = torch.tensor([1.0, 0.0, 0.0])


def red_box_on_blue(
    height: int = 90,
    width: int = 150,
    top: int = 20,
    left: int = 30,
    box_height: int = 30,
    box_width: int = 60,
):
    """A red rectangle on blue and its mask."""
    image = torch.zeros(1, height, width, 3)
    image[..., 2] = 1
    mask = torch.zeros(1, height, width)
    image[:, top : top + box_height, left : left + box_width] = RED
    mask[:, top : top + box_height, left : left + box_width] = 1
    return image, mask


def bounds(mask: Tensor, threshold: float = 0.5):
    """Top, bottom, left and right of what is in the mask, ends exclusive."""
    rows = (mask > threshold).any(1).nonzero().flatten()
    columns = (mask > threshold).any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@pytest.mark.parametrize(("background", "shade"), [("white", 1.0), ("grey", 0.5), ("black", 0.0)])
def test_red_rectangle_ends_centred_with_exact_colours(background: str, shade: float):
    image, mask = red_box_on_blue()
    prepared, subject = prepare_reference_image(
        image, mask, size=128, fill=0.75, background=background
    )
    expected_mask = torch.zeros(128, 128)
    expected_mask[40:88, 16:112] = 1  # 96 wide, 48 high
    expected = torch.full((128, 128, 3), shade)
    expected[40:88, 16:112] = RED
    assert torch.equal(subject[0], expected_mask)
    assert torch.equal(prepared[0], expected)


def test_upright_subject_fills_the_height():
    image, mask = red_box_on_blue(box_height=60, box_width=20)
    _, subject = prepare_reference_image(image, mask, size=120, fill=1.0)
    assert bounds(subject[0]) == (0, 120, 40, 80)


def test_defaults_give_512_white_with_fill_085():
    image, subject = prepare_reference_image(torch.zeros(1, 40, 100, 3))
    assert image.shape == (1, 512, 512, 3)
    assert subject.shape == (1, 512, 512)
    top, bottom, left, right = bounds(subject[0])
    assert (right - left, bottom - top) == (435, 174)
    assert (image[subject == 0] == 1).all()
    assert (image[subject == 1] == 0).all()


def test_without_mask_the_rectangle_of_the_whole_image_is_marked():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 96, 64, 3, generator=generator)
    prepared, subject = prepare_reference_image(image, size=96, fill=1.0)
    expected = torch.zeros(2, 96, 96)
    expected[:, :, 16:80] = 1
    assert torch.equal(subject, expected)
    # The same size is not resampled: the pixels come through unchanged.
    torch.testing.assert_close(prepared[:, :, 16:80], image, rtol=0, atol=1e-6)
    assert (prepared[:, :, :16] == 1).all()


def test_old_background_does_not_bleed_into_soft_edges():
    image = torch.zeros(1, 200, 240, 3)
    image[..., 1] = 1  # green everywhere
    mask = torch.zeros(1, 200, 240)
    rows = torch.arange(200)[:, None] - 100.0
    columns = torch.arange(240)[None] - 120.0
    mask[0] = ((80 - (rows**2 + columns**2).sqrt()) / 10).clamp(0, 1)
    image[0][mask[0] > 0] = RED
    prepared, _ = prepare_reference_image(image, mask, size=64, fill=0.9)
    # Red over white keeps red at 1, and green never exceeds blue.
    assert (prepared[..., 0] > 1 - 1e-5).all()
    assert (prepared[..., 1] <= prepared[..., 2] + 1e-6).all()


def test_batch_has_each_image_cropped_by_its_own_mask():
    wide, wide_mask = red_box_on_blue(box_height=20, box_width=60)
    high, high_mask = red_box_on_blue(box_height=60, box_width=20)
    images, masks = torch.cat([wide, high, wide]), torch.cat([wide_mask, high_mask, wide_mask])
    image, subject = prepare_reference_image(images, masks, size=64, fill=0.75)
    assert bounds(subject[0]) == (24, 40, 8, 56)
    assert bounds(subject[1]) == (8, 56, 24, 40)
    for row in range(3):
        alone = prepare_reference_image(
            images[row : row + 1], masks[row : row + 1], size=64, fill=0.75
        )
        assert torch.equal(image[row], alone[0][0])
        assert torch.equal(subject[row], alone[1][0])


@pytest.mark.parametrize("drop_batch_axis", [False, True])
def test_one_mask_serves_every_image(drop_batch_axis: bool):
    image, mask = red_box_on_blue()
    images = torch.cat([image, 1 - image])
    mask = mask[0] if drop_batch_axis else mask
    _, subject = prepare_reference_image(images, mask, size=64)
    assert torch.equal(subject[0], subject[1])


def test_alpha_is_the_mask_when_there_is_none():
    image, mask = red_box_on_blue()
    rgba = torch.cat([image, mask[..., None]], dim=-1)
    by_alpha = prepare_reference_image(rgba, size=64)
    by_mask = prepare_reference_image(image, mask, size=64)
    assert torch.equal(by_alpha[0], by_mask[0])
    assert torch.equal(by_alpha[1], by_mask[1])


def test_alpha_and_mask_are_multiplied():
    image, mask = red_box_on_blue()
    alpha = torch.zeros_like(mask)
    alpha[:, :, :60] = 1  # the left half of the box stays
    rgba = torch.cat([image, alpha[..., None]], dim=-1)
    _, subject = prepare_reference_image(rgba, mask, size=80, fill=0.5)
    assert bounds(subject[0]) == (20, 60, 20, 60)


def test_half_transparent_image_is_composited():
    rgba = torch.zeros(1, 16, 16, 4)
    rgba[..., 0], rgba[..., 3] = 1, 0.5
    image, subject = prepare_reference_image(rgba, size=64, fill=1.0)
    expected = torch.tensor([1.0, 0.5, 0.5]).expand_as(image)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(subject, torch.full_like(subject, 0.5), rtol=0, atol=1e-6)


def test_greyscale_is_repeated_to_three_channels():
    grey = torch.rand(1, 30, 50, 1, generator=torch.Generator().manual_seed(1))
    image, _ = prepare_reference_image(grey, size=64)
    assert torch.equal(image, prepare_reference_image(grey.expand(-1, -1, -1, 3), size=64)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_gives_float32(dtype: torch.dtype):
    image, mask = red_box_on_blue()
    expected = prepare_reference_image(image, mask, size=64)
    given = prepare_reference_image(image.to(dtype), mask.to(dtype), size=64)
    for one, other in zip(given, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_mask_of_another_size_and_same_aspect_is_resized():
    image, mask = red_box_on_blue()
    double = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    _, subject = prepare_reference_image(image, double, size=128, fill=0.75)
    assert bounds(subject[0]) == (40, 88, 16, 112)


def test_coarser_mask_of_the_same_aspect_is_resized():
    image, _ = red_box_on_blue()
    mask = torch.zeros(9, 15)
    mask[2:5, 3:9] = 1
    _, subject = prepare_reference_image(image, mask, size=128, fill=0.75)
    top, bottom, left, right = bounds(subject[0], threshold=0.05)
    assert (left, right) == (16, 112)
    assert bottom - top == pytest.approx(48, abs=8)


def test_inputs_are_left_untouched():
    image, mask = red_box_on_blue()
    copies = image.clone(), mask.clone()
    prepare_reference_image(image, mask, size=64)
    assert torch.equal(image, copies[0])
    assert torch.equal(mask, copies[1])


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(20, 90),
    width=st.integers(20, 90),
    top=st.integers(0, 8),
    left=st.integers(0, 8),
    box_height=st.integers(1, 90),
    box_width=st.integers(8, 90),
    size=st.sampled_from([64, 104, 256]),
    fill=st.floats(0.2, 1.0),
)
def test_mask_bounds_match_fill(
    height: int,
    width: int,
    top: int,
    left: int,
    box_height: int,
    box_width: int,
    size: int,
    fill: float,
):
    image = torch.full((1, height, width, 3), 0.25)
    mask = torch.zeros(1, height, width)
    mask[:, top : top + box_height, left : left + box_width] = 1
    box_height, box_width = min(box_height, height - top), min(box_width, width - left)
    prepared, subject = prepare_reference_image(image, mask, size=size, fill=fill)
    first_row, last_row, first_column, last_column = bounds(subject[0])
    sides = last_row - first_row, last_column - first_column
    assert max(sides) == round(fill * size)
    longer = max(box_height, box_width)
    assert sides[0] == pytest.approx(max(1, fill * size * box_height / longer), abs=1)
    assert sides[1] == pytest.approx(max(1, fill * size * box_width / longer), abs=1)
    assert abs(first_row - (size - last_row)) <= 1
    assert abs(first_column - (size - last_column)) <= 1
    assert (prepared[subject == 0] == 1).all()
    assert torch.allclose(prepared[subject == 1], torch.tensor(0.25), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), channels=st.sampled_from([1, 3, 4]))
def test_any_image_stays_in_range(seed: int, channels: int):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 33, 21, channels, generator=generator).round()
    mask = torch.rand(2, 33, 21, generator=generator).round()
    for prepared in prepare_reference_image(image, mask, size=64):
        assert prepared.min() >= 0
        assert prepared.max() <= 1


def test_very_long_image_keeps_one_pixel():
    _, subject = prepare_reference_image(torch.zeros(1, 1, 2000, 3), size=64, fill=0.5)
    assert bounds(subject[0]) == (31, 32, 16, 48)


def test_image_of_6000_by_6000_is_accepted():
    image = torch.zeros(1, 1, 1, 1).expand(1, 6000, 6000, 1)
    prepared, subject = prepare_reference_image(image, size=64, fill=0.75)
    assert prepared.shape == (1, 64, 64, 3)
    assert bounds(subject[0]) == (8, 56, 8, 56)


@pytest.mark.parametrize("fill", [0, -0.1, 1.01, float("nan"), "0.5", 0.001])
def test_fill_out_of_range_is_refused(fill: Any):
    with pytest.raises(InputError, match=r"Expected fill .* got"):
        prepare_reference_image(torch.zeros(1, 16, 16, 3), fill=fill, size=64)


@pytest.mark.parametrize("size", [0, 56, 100, 2056, 512.0, -64, True])
def test_size_out_of_range_is_refused(size: Any):
    with pytest.raises(InputError, match="multiple of 8 in 64"):
        prepare_reference_image(torch.zeros(1, 16, 16, 3), size=size)


def test_unknown_background_is_refused():
    with pytest.raises(InputError, match="white, grey, black, got 'gray'"):
        prepare_reference_image(torch.zeros(1, 16, 16, 3), background="gray")


@pytest.mark.parametrize("shape", [(16, 16, 3), (1, 3, 16, 16), (1, 16, 16, 2), (1, 1, 16, 16, 3)])
def test_misshapen_image_is_refused(shape: tuple[int, ...]):
    with pytest.raises(InputError, match="Put the channels last"):
        prepare_reference_image(torch.zeros(shape))


def test_something_else_than_a_tensor_is_refused():
    nested: Any = [[0.0]]
    with pytest.raises(InputError, match="got list"):
        prepare_reference_image(nested)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 7, 7, 3), (0, 16, 16, 3), (1, 0, 16, 3)])
def test_image_below_8_pixels_is_refused(shape: tuple[int, ...]):
    with pytest.raises(InputError, match=f"got {shape[0]} of {shape[2]} x {shape[1]}"):
        prepare_reference_image(torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad: float):
    image, mask = red_box_on_blue()
    image[0, 5, 7, 1] = bad
    with pytest.raises(InputError, match="finite values in the image"):
        prepare_reference_image(image, mask)
    image, mask = red_box_on_blue()
    mask[0, 5, 7] = bad
    with pytest.raises(InputError, match="finite values in the mask"):
        prepare_reference_image(image, mask)


@pytest.mark.parametrize("image", [torch.full((1, 16, 16, 3), 255.0), -torch.ones(1, 16, 16, 3)])
def test_values_of_another_range_are_refused(image: Tensor):
    with pytest.raises(InputError, match=r"values in \[0, 1\] in the image"):
        prepare_reference_image(image)


def test_bytes_are_refused():
    with pytest.raises(InputError, match=r"torch\.uint8"):
        prepare_reference_image(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))


def test_mask_of_another_aspect_is_refused_naming_both_sizes():
    image, mask = red_box_on_blue(height=90, width=150)
    with pytest.raises(InputError, match=r"150 x 90 .* 90 x 150"):
        prepare_reference_image(image, mask.transpose(1, 2))


@pytest.mark.parametrize(("images", "masks"), [(3, 2), (1, 2)])
def test_batches_of_unequal_length_are_refused(images: int, masks: int):
    image, mask = red_box_on_blue()
    with pytest.raises(InputError, match=f"each of the {images} images, got {masks}"):
        prepare_reference_image(image.expand(images, -1, -1, -1), mask.expand(masks, -1, -1))


def test_misshapen_mask_is_refused():
    image, mask = red_box_on_blue()
    with pytest.raises(InputError, match="without the channel axis"):
        prepare_reference_image(image, mask[..., None])


def test_empty_mask_is_refused():
    image, mask = red_box_on_blue()
    with pytest.raises(InputError, match=r"empty one for image 2 \(largest value 0\)"):
        prepare_reference_image(image.expand(2, -1, -1, -1), torch.cat([mask, mask * 0]))


def test_fully_transparent_image_is_refused():
    with pytest.raises(InputError, match="empty"):
        prepare_reference_image(torch.zeros(1, 16, 16, 4))


def test_speck_of_a_subject_is_refused():
    image, mask = red_box_on_blue(box_height=3, box_width=7)
    with pytest.raises(InputError, match="got 7 x 3"):
        prepare_reference_image(image, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.uint8])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 13), (64, 96), (90, 33), (1, 1)])
def test_resize_mask_keeps_zeros_and_ones_exact(dtype: torch.dtype, height: int, width: int):
    mask = torch.zeros(2, 61, 47)
    mask[1] = 1
    resized = resize_mask(mask.to(dtype), height, width)
    assert resized.dtype == torch.float32
    assert torch.equal(resized[0], torch.zeros(height, width))
    assert torch.equal(resized[1], torch.ones(height, width))


def test_resize_mask_averages_areas():
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0, 0.0, 0.5]])
    assert torch.equal(resize_mask(mask, 1, 3), torch.tensor([[[0.5, 0.5, 0.25]]]))


@pytest.mark.parametrize(
    ("mask_size", "size"),
    [
        ((512, 768), (64, 96)),
        ((100, 100), (100, 102)),
        ((100, 102), (100, 100)),
        ((60, 100), (7, 12)),  # latents of a 60 x 100 image
        ((330, 500), (41, 62)),
    ],
)
def test_equal_aspects_pass(mask_size: tuple[int, int], size: tuple[int, int]):
    check_mask_aspect(torch.zeros(1, *mask_size), *size)


@pytest.mark.parametrize(
    ("mask_size", "size"),
    [((512, 768), (96, 64)), ((100, 103), (100, 100)), ((64, 64), (64, 68)), ((0, 5), (5, 5))],
)
def test_other_aspects_are_refused(mask_size: tuple[int, int], size: tuple[int, int]):
    names = rf"{size[1]} x {size[0]} .* {mask_size[1]} x {mask_size[0]}"
    with pytest.raises(InputError, match=names):
        check_mask_aspect(torch.zeros(1, *mask_size), *size)
