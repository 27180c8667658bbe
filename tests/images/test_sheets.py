"""Sheets and thumbnails: every image in its cell, every caption cut to it."""

import time

import pytest
import torch

from dreamcache_core.errors import FileFormatError
from dreamcache_core.images.files import encode_png
from dreamcache_core.images.sheets import (
    contact_sheet,
    encode_thumbnails,
    read_thumbnails,
    sheet_cell,
)


def test_contact_sheet_places_images_by_row_and_column():
    colours = torch.eye(3).reshape(3, 1, 1, 1, 3)
    wide, square, high = (
        colours[0].expand(1, 5, 10, 3),
        colours[1].expand(1, 7, 7, 3),
        colours[2].expand(1, 10, 5, 3),
    )
    sheet = contact_sheet([[wide, square], [high]], cell_px=40)
    assert sheet.shape == (1, 80, 80, 3)
    assert sheet[0, 20, 2].tolist() == [1, 0, 0]  # wide: full width ...
    assert sheet[0, 4, 20].tolist() == [1, 1, 1]  # ... with white above
    assert sheet[0, 2, 78].tolist() == [0, 1, 0]
    assert sheet[0, 42, 20].tolist() == [0, 0, 1]
    assert sheet[0, 60, 4].tolist() == [1, 1, 1]
    assert (sheet[0, 40:, 40:] == 1).all()


def test_images_may_be_shrunk_to_their_cells_before_they_are_laid_out():
    images = [torch.rand(1, 300, 500, 3), torch.rand(1, 20, 10, 3)]
    cells = [sheet_cell(image) for image in images]
    assert {cell.size for cell in cells} == {(256, 256)}
    assert torch.equal(contact_sheet([cells]), contact_sheet([images]))


def test_contact_sheet_writes_captions_inside_their_cells():
    white = torch.ones(1, 8, 8, 3)
    captions = [["a very long caption " * 9, ""], ["\u732b", "seed 7"]]
    sheet = contact_sheet([[white] * 2] * 2, captions, cell_px=64)
    assert sheet.shape == (1, 2 * 84, 128, 3)
    assert (sheet[0, 64:84, :64] < 0.5).any()
    assert (sheet[0, 64:84, 64:] == 1).all()
    assert (sheet[0, 148:, 64:] < 0.5).any()
    assert (sheet[0, :64] == 1).all()


def test_thumbnails_are_small_and_show_the_images_in_rows_of_four():
    ramp = torch.linspace(0, 1, 640)[:, None].expand(1, 480, 640, 3)
    images = torch.cat([ramp, 1 - ramp])
    thumbnails = encode_thumbnails(images)
    assert all(len(one) < 8_000 for one in thumbnails)
    sheet = read_thumbnails([*thumbnails, *thumbnails[:1] * 3], "cat.safetensors")
    assert sheet.shape == (1, 2 * 128, 4 * 128, 3)
    (small,) = contact_sheet([[images[:1], images[1:]]], cell_px=128)
    assert (sheet[0, :128, :256] - small).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("thumbnail", "said"),
    [
        (b"no image", "cannot be read"),
        (encode_png(torch.zeros(1, 4, 4000, 3)), "4000 x 4 pixels; expected at most 128"),
    ],
)
def test_a_thumbnail_of_a_stranger_that_is_none_is_refused(thumbnail: bytes, said: str):
    with pytest.raises(FileFormatError, match=rf"cat\.safetensors.*{said}"):
        read_thumbnails([thumbnail], "cat.safetensors")


def test_caption_of_any_length_is_drawn_at_once():
    """4,000 characters took 35 s."""
    rows = [[torch.rand(1, 8, 8, 3)]]
    start = time.process_time()
    long = contact_sheet(rows, [["word " * 100_000]])
    assert time.process_time() - start < 2
    assert torch.equal(long, contact_sheet(rows, [["word " * 60]]))
    assert not torch.equal(long, contact_sheet(rows, [["word"]]))


@pytest.mark.parametrize("count", [1, 5, 20, 40, 80])
def test_caption_is_cut_where_it_no_longer_fits(count: int):
    rows, text = [[torch.ones(1, 8, 8, 3)]], "i" * count + "W" * count
    sheet = contact_sheet(rows, [[text]], cell_px=200)
    assert (sheet[:, :, 196:] == 1).all()
