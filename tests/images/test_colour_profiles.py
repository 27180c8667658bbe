"""Colour profiles: what is read is sRGB, whatever the file is stored in; a broken profile counts as none."""

import io
from pathlib import Path

import pytest
import torch
from colour_profiles import ADOBE_RGB, DISPLAY_P3, LINEAR_GREY, ODD_INKS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, TiffImagePlugin, TiffTags, features
from PIL._util import DeferredError
from torch import Tensor

from dreamcache_core.data.sources.opening import open_source
from dreamcache_core.images import colour_profiles
from dreamcache_core.images.files import read_image, read_mask

MEANT = (200, 60, 40)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
KINDS = ["PNG", "JPEG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


def stored_in(profile: bytes, colour: tuple[int, int, int] = MEANT) -> Image.Image:
    """An image of one colour as a camera of this profile stores it."""
    wide = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    stored = ImageCms.profileToProfile(Image.new("RGB", (16, 12), colour), SRGB, wide)
    assert stored is not None
    return stored


def saved(image: Image.Image, kind: str, profile: bytes | None) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, icc_profile=profile)
    return stream.getvalue()


def colour_of(image: Tensor) -> tuple[int, ...]:
    return tuple(int(value) for value in (image[0, 6, 8] * 255).round())


def is_near(colour: tuple[int, ...], other: tuple[int, ...], within: int) -> bool:
    return max(abs(one - two) for one, two in zip(colour, other, strict=True)) <= within


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", [ADOBE_RGB, DISPLAY_P3], ids=["AdobeRGB", "Display P3"])
def test_icc_profile_wide_colours_are_read_as_meant(kind: str, profile: bytes):
    stored = stored_in(profile)
    assert not is_near(stored.getpixel((8, 6)), MEANT, 15)
    image, mask = read_image(saved(stored, kind, profile))
    assert is_near(colour_of(image), MEANT, 5)
    assert mask is None


def test_icc_profile_leaves_alpha_and_orientation_as_they_are(tmp_path: Path):
    stored = stored_in(DISPLAY_P3)
    stored.putalpha(Image.linear_gradient("L").resize((16, 12)))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "a.png", icc_profile=DISPLAY_P3, exif=exif)
    stored.save(tmp_path / "b.png", exif=exif)
    (image, mask), (_, untagged) = (read_image(tmp_path / name) for name in ("a.png", "b.png"))
    assert image.shape == (1, 16, 12, 3)
    assert is_near(colour_of(image), MEANT, 2)
    assert mask is not None
    assert untagged is not None
    assert torch.equal(mask, untagged)


def test_icc_profile_of_a_palette_holds_for_its_colours():
    palette = stored_in(DISPLAY_P3).convert("P", palette=Image.Palette.ADAPTIVE)
    assert is_near(colour_of(read_image(saved(palette, "PNG", DISPLAY_P3))[0]), MEANT, 2)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_icc_profile_of_grey_is_converted(mode: str):
    # linear 0.5 is 188 of 255 in sRGB
    image, _ = read_image(saved(Image.new("L", (16, 12), 128).convert(mode), "PNG", LINEAR_GREY))
    assert is_near(colour_of(image), (188, 188, 188), 1)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_icc_profile_of_inks_is_converted(kind: str):
    cyan = saved(Image.new("CMYK", (16, 12), (255, 0, 0, 0)), kind, ODD_INKS)
    assert is_near(colour_of(read_image(cyan)[0]), (237, 126, 52), 2)  # L* 65, a* 40, b* 55
    paper = saved(Image.new("CMYK", (16, 12)), kind, ODD_INKS)
    assert colour_of(read_image(paper)[0]) == (255, 255, 255)


def test_icc_profile_of_srgb_changes_nothing():
    noise = torch.randint(0, 256, (90 * 70 * 3,), generator=torch.Generator().manual_seed(0))
    image = Image.frombytes("RGB", (90, 70), bytes(noise.tolist()))
    tagged, untagged = (
        read_image(saved(image, "PNG", profile))[0] for profile in (SRGB.tobytes(), None)
    )
    assert torch.equal(tagged, untagged)


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"no profile"),
        ("RGB", DISPLAY_P3[:200]),
        ("RGB", LINEAR_GREY),
        ("RGB", ODD_INKS),
        ("L", DISPLAY_P3),
        ("CMYK", DISPLAY_P3),
    ],
)
def test_icc_profile_that_is_broken_or_of_other_channels_counts_as_none(mode: str, profile: bytes):
    image = Image.new("RGB", (16, 12), MEANT).convert(mode)
    tagged, untagged = (read_image(saved(image, "TIFF", each))[0] for each in (profile, None))
    assert torch.equal(tagged, untagged)


def test_icc_profile_of_a_tiff_that_is_a_number_counts_as_none():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[TiffImagePlugin.ICCPROFILE] = TiffTags.SHORT
    tags[TiffImagePlugin.ICCPROFILE] = 7
    stream = io.BytesIO()
    Image.new("RGB", (16, 12), MEANT).save(stream, "TIFF", tiffinfo=tags)
    assert colour_of(read_image(stream.getvalue())[0]) == MEANT


@settings(max_examples=300, deadline=None)
@given(profile=st.sampled_from([ADOBE_RGB, LINEAR_GREY, ODD_INKS]), data=st.data())
def test_icc_profile_with_damaged_bytes_still_gives_an_image(profile: bytes, data: st.DataObject):
    mode = {ADOBE_RGB: "RGB", LINEAR_GREY: "L", ODD_INKS: "CMYK"}[profile]
    damaged = bytearray(profile)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    image, _ = read_image(saved(Image.new(mode, (16, 12)), "TIFF", bytes(damaged)))
    assert image.shape == (1, 12, 16, 3)
    assert 0 <= image.min() <= image.max() <= 1


def test_icc_profile_does_not_grey_the_white_of_a_mask():
    mask = stored_in(ADOBE_RGB, (255, 255, 255))
    assert read_mask(saved(mask, "PNG", ADOBE_RGB)).min() == 1


def test_icc_profile_holds_in_a_training_set(tmp_path: Path):
    stored_in(DISPLAY_P3).save(tmp_path / "a_generation.png", icc_profile=DISPLAY_P3)
    Image.new("L", (16, 12), 255).save(tmp_path / "a_mask.png")
    (tmp_path / "a_caption.txt").write_text("a box")
    pair = open_source(tmp_path).read(0)
    assert is_near(colour_of(pair.target), MEANT, 2)
    assert is_near(colour_of(pair.subject), MEANT, 2)


def test_icc_profile_is_left_with_one_warning_where_pillow_lacks_littlecms(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    stored = stored_in(DISPLAY_P3)
    tagged, untagged = (saved(stored, "PNG", profile) for profile in (DISPLAY_P3, None))
    monkeypatch.setattr(ImageCms, "core", DeferredError.new(ImportError("no _imagingcms")))
    colour_profiles.warn_of_missing_littlecms.cache_clear()
    for _ in range(2):
        assert torch.equal(read_image(tagged)[0], read_image(untagged)[0])
    assert len(caplog.records) == 1
    assert "no LittleCMS" in caplog.text
