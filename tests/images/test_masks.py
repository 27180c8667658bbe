"""What a mask marks: decided by the mask where that is sure, and said."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dreamcache_core.images.masks import (
    EMPTY,
    TURNED,
    UNSURE,
    find_subject,
    given_mask,
    in_words,
    on_white,
    shows_background,
)
from dreamcache_core.images.reference_files import read_references

SIZE = 100


def marked(top: int, bottom: int, left: int, right: int) -> Tensor:
    """A mask of 1 in a rectangle."""
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, top:bottom, left:right] = 1
    return mask


def photo(channels: int = 3) -> Tensor:
    return torch.rand((1, SIZE, SIZE, channels), generator=torch.Generator().manual_seed(0))


CENTRE = marked(30, 80, 30, 70)
BUST = marked(20, 100, 10, 90)
"""A subject that takes four fifths of the lower border."""
CLOSE_UP = 1 - marked(0, 12, 0, 100)
"""A subject that fills the image, but for a strip along the top."""
IN_THE_CORNER = marked(0, 30, 0, 30)


@pytest.mark.parametrize("subject", [CENTRE, BUST], ids=["centre", "bust"])
def test_a_mask_is_brought_the_same_way_round_from_both(subject: Tensor):
    assert torch.equal(given_mask(subject, "auto")[0], subject)
    turned, notes = given_mask(1 - subject, "auto")
    assert torch.equal(turned, subject)
    assert notes == [TURNED]


def test_what_is_forced_is_not_looked_at():
    for mask in (CENTRE, 1 - CENTRE, CLOSE_UP, torch.ones(1, SIZE, SIZE)):
        assert torch.equal(given_mask(mask, "subject")[0], mask)
        assert torch.equal(given_mask(mask, "background")[0], 1 - mask)
        assert given_mask(mask, "background")[1] == [""]


@pytest.mark.parametrize(
    "mask", [CLOSE_UP, IN_THE_CORNER, marked(10, 90, 0, 25)], ids=["close-up", "corner", "edge"]
)
def test_what_is_not_sure_marks_the_subject_and_is_said(mask: Tensor):
    kept, notes = given_mask(mask, "auto")
    assert torch.equal(kept, mask)
    assert notes == [UNSURE]


def test_a_soft_mask_is_turned_round_too():
    soft = torch.nn.functional.avg_pool2d(
        1 - CENTRE, 9, stride=1, padding=4, count_include_pad=False
    )
    assert given_mask(soft, "auto")[1] == [TURNED]


def test_a_full_mask_stays_full():
    for speck in (0, 5):
        full = torch.ones(1, SIZE, SIZE)
        full[:, 50 : 50 + speck, 50 : 50 + speck] = 0
        assert torch.equal(given_mask(full, "auto")[0], full)


def test_rows_are_decided_one_by_one():
    mask = torch.cat([CENTRE, 1 - CENTRE, torch.zeros(1, SIZE, SIZE)])
    settled, notes = given_mask(mask, "auto")
    assert torch.equal(settled, torch.cat([CENTRE, CENTRE, torch.ones(1, SIZE, SIZE)]))
    assert in_words(notes) == [f"{TURNED} (1 of 3 images)", f"{EMPTY} (1 of 3 images)"]


@pytest.mark.parametrize("marks", ["auto", "subject", "background"])
@pytest.mark.parametrize("shape", [(64, 64), (1, 64, 64), (3, 64, 64)])
def test_zeros_of_64_by_64_are_the_placeholder(shape: tuple[int, ...], marks: str):
    mask = torch.zeros(shape)
    assert given_mask(mask, marks)[0] is None
    mask[..., 3, 5] = 1
    assert given_mask(mask, marks)[0] is not None


def test_other_masks_are_no_placeholder():
    assert given_mask(torch.zeros(1, 64, 65))[0] is not None
    assert given_mask(torch.ones(1, 64, 64))[0] is not None


@pytest.mark.parametrize("height", [1, 3, 8])
def test_an_image_that_is_all_border_has_a_mask_too(height: int):
    mask = torch.ones(1, height, 50)
    mask[..., :25] = 0
    assert torch.equal(given_mask(mask, "auto")[0], mask)


BACKGROUND = "the background is in the reference (paint the subject: right-click the image, Open in MaskEditor)"


@pytest.mark.parametrize(
    ("mask", "note"),
    [
        (CENTRE, "subject covers 20 %"),
        (1 - CENTRE, f"{TURNED}, subject covers 20 %"),
        (torch.cat([CENTRE, BUST]), "subject covers 20 to 64 %"),
        (None, f"no mask: {BACKGROUND}"),
        (torch.zeros(1, 64, 64), f"nothing is painted in the mask: {BACKGROUND}"),
        (torch.zeros(1, SIZE, SIZE), f"{EMPTY}: the background is in the reference"),
        (
            torch.ones(1, SIZE, SIZE),
            "the mask covers all of the image: the background is in the reference",
        ),
    ],
    ids=["subject", "background", "two", "none", "placeholder", "empty", "full"],
)
def test_what_was_made_of_a_mask_is_said(mask: Tensor | None, note: str):
    images = photo().repeat(1 if mask is None else len(mask), 1, 1, 1)
    subject = find_subject(images, mask)
    assert subject.note == note
    assert (subject.opacity is None) == ("covers 20" not in note)


def test_alpha_counts_as_the_subject_whatever_the_mask_is():
    image = photo(4)
    image[..., 3] = BUST
    assert torch.equal(find_subject(image).opacity, BUST)
    assert torch.equal(find_subject(image, 1 - CENTRE).opacity, CENTRE * BUST)
    image[..., 3] = 1
    assert find_subject(image).opacity is None


def test_a_subject_on_white_needs_no_mask_and_on_black_it_does():
    image = photo() * CENTRE[..., None] + 1 - CENTRE[..., None]
    assert not shows_background(image)
    assert find_subject(image).note == "no mask, white background"
    assert find_subject(1 - image).note == f"no mask: {BACKGROUND}"


def test_transparent_places_are_laid_on_white():
    image = photo(4)
    image[..., 3] = CENTRE
    white = on_white(image)
    assert torch.equal(white[0, 0, 0], torch.ones(3))
    torch.testing.assert_close(white[:, 40:60, 40:60], image[:, 40:60, 40:60, :3])
    assert torch.equal(on_white(photo()), photo())
    image[..., 3] = 1
    assert torch.equal(on_white(image), image[..., :3])
    assert on_white(photo(1)).shape == (1, SIZE, SIZE, 3)


def test_a_mask_of_the_background_is_warned_of_where_files_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, mask = Image.new("RGB", (60, 40), "red"), Image.new("L", (60, 40))
    mask.paste(255, (20, 10, 40, 30))
    for name, each in (("a", image), ("right", mask), ("wrong", ImageOps.invert(mask))):
        each.save(tmp_path / f"{name}.png")
    read_references([tmp_path / "a.png"], [tmp_path / "right.png"])
    assert caplog.text == ""
    ((_, mask_read),) = read_references([tmp_path / "a.png"], [tmp_path / "wrong.png"])
    assert "wrong.png covers the border" in caplog.text
    assert mask_read is not None
    assert (float(mask_read[0, 0, 0]), float(mask_read[0, 20, 30])) == (0, 1)


def test_a_faint_mask_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / "a.png")
    Image.fromarray((CENTRE[0] * 128).byte().numpy()).save(tmp_path / "mask.png")
    read_references([tmp_path / "a.png"], [tmp_path / "mask.png"])
    assert "mask.png: the mask has values up to 0.5 of 1, which fades the subject" in caplog.text
    assert "which fades the subject" in find_subject(photo(), CENTRE / 2).note
    assert "fades" not in find_subject(photo(), CENTRE).note
