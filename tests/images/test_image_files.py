"""Image files: every common kind is read as it is meant to be seen, and nothing else is."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from dreamcache_core.errors import DreamCacheError, FileFormatError, InputError
from dreamcache_core.images import files
from dreamcache_core.images.files import encode_png, open_image, read_image, read_mask, save_png

DAMAGED_KINDS = ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"]
if features.check("avif"):
    DAMAGED_KINDS.append("AVIF")


@pytest.fixture
def pil_image():
    """An image of 5 x 3 (width x height) with every pixel different."""
    return Image.frombytes("RGB", (5, 3), bytes(range(0, 225, 5)))


def tensor_of(pil_image: Image.Image):
    values = torch.frombuffer(bytearray(pil_image.convert("RGB").tobytes()), dtype=torch.uint8)
    return values.reshape(1, pil_image.height, pil_image.width, 3).float() / 255


def png_header(width: int, height: int):
    """The beginning of a PNG that claims a size and holds next to no data."""

    def chunk(kind: bytes, data: bytes):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_rgb_is_read_exactly(tmp_path: Path, pil_image: Image.Image, suffix: str):
    path = tmp_path / f"a.{suffix}"
    pil_image.save(path)
    image, mask = read_image(path)
    assert image.shape == (1, 3, 5, 3)
    assert image.dtype == torch.float32
    assert torch.equal(image, tensor_of(pil_image))
    assert mask is None


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int):
    # As seen: left half red, right half blue, with a white top edge.
    seen = Image.new("RGB", (64, 32), (255, 0, 0))
    seen.paste((0, 0, 255), (32, 0, 64, 32))
    seen.paste((255, 255, 255), (0, 0, 64, 8))
    to_stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = seen.transpose(to_stored[orientation]) if orientation > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif.tobytes(), quality=95)
    image, _ = read_image(path)
    assert image.shape == (1, 32, 64, 3)
    torch.testing.assert_close(image[0, 20, 8], torch.tensor([1.0, 0, 0]), rtol=0, atol=0.05)
    torch.testing.assert_close(image[0, 20, 56], torch.tensor([0, 0, 1.0]), rtol=0, atol=0.05)
    torch.testing.assert_close(image[0, 3, 30], torch.ones(3), rtol=0, atol=0.05)


def test_rgba_gives_stored_colours_and_alpha(tmp_path: Path, pil_image: Image.Image):
    alpha = Image.frombytes("L", (5, 3), bytes(range(0, 255, 17)))
    rgba = pil_image.copy()
    rgba.putalpha(alpha)
    rgba.save(tmp_path / "a.png")
    image, mask = read_image(tmp_path / "a.png")
    assert torch.equal(image, tensor_of(pil_image))
    assert mask is not None
    assert torch.equal(mask, torch.arange(0, 255, 17).reshape(1, 3, 5) / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_alpha_is_no_mask(tmp_path: Path, pil_image: Image.Image, mode: str):
    pil_image.convert(mode).save(tmp_path / "a.png")
    image, mask = read_image(tmp_path / "a.png")
    assert image.shape == (1, 3, 5, 3)
    assert mask is None


def test_greyscale_is_repeated(tmp_path: Path, pil_image: Image.Image):
    grey = pil_image.convert("L")
    grey.save(tmp_path / "a.png")
    image, mask = read_image(tmp_path / "a.png")
    assert torch.equal(image, tensor_of(grey))
    assert mask is None


def test_bilevel_is_black_and_white(tmp_path: Path):
    bilevel = Image.new("1", (4, 2))
    bilevel.putpixel((3, 1), 1)
    bilevel.save(tmp_path / "a.png")
    image, _ = read_image(tmp_path / "a.png")
    expected = torch.zeros(1, 2, 4, 3)
    expected[0, 1, 3] = 1
    assert torch.equal(image, expected)


def test_palette_with_transparency(tmp_path: Path):
    palette = Image.new("P", (3, 2))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2, 2, 1, 0])
    palette.save(tmp_path / "a.png", transparency=bytes([255, 0, 51]))
    image, mask = read_image(tmp_path / "a.png")
    assert torch.equal(image[0, 0], torch.eye(3))
    assert torch.equal(image[0, 1], torch.eye(3).flip(0))
    expected = torch.tensor([[[255.0, 0, 51], [51, 0, 255]]]) / 255
    assert mask is not None
    assert torch.equal(mask, expected)


def test_palette_without_transparency(tmp_path: Path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([1, 0])
    palette.save(tmp_path / "a.png")
    image, mask = read_image(tmp_path / "a.png")
    assert image.tolist() == [[[[0, 1, 0], [1, 0, 0]]]]
    assert mask is None


def test_transparent_colour_of_an_rgb_png_becomes_the_mask(tmp_path: Path):
    pil_image = Image.new("RGB", (2, 1), (10, 20, 30))
    pil_image.putpixel((1, 0), (40, 50, 60))
    pil_image.save(tmp_path / "a.png", transparency=(40, 50, 60))
    _, mask = read_image(tmp_path / "a.png")
    assert mask is not None
    assert mask.tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_greyscale_is_scaled_by_65535(tmp_path: Path, suffix: str):
    values = [0, 1, 256, 32768, 65534, 65535]
    deep = Image.frombytes("I;16", (3, 2), struct.pack("<6H", *values))
    deep.save(tmp_path / f"a.{suffix}")
    image, mask = read_image(tmp_path / f"a.{suffix}")
    expected = (torch.tensor(values).float() / 65535).reshape(1, 2, 3, 1).expand(-1, -1, -1, 3)
    assert torch.equal(image, expected)
    assert mask is None


def test_32_bit_integers_in_16_bit_range_are_read_and_others_refused(tmp_path: Path):
    fitting = Image.frombytes("I", (2, 1), struct.pack("=2i", 0, 65535))
    fitting.save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0].tolist() == [[[[0] * 3, [1] * 3]]]
    deeper = Image.frombytes("I", (2, 1), struct.pack("=2i", 0, 65536))
    deeper.save(tmp_path / "b.tiff")
    with pytest.raises(FileFormatError, match=r"0 \.\.\. 65535, got 0 \.\.\. 65536"):
        read_image(tmp_path / "b.tiff")


def test_float_greyscale_beyond_one_is_refused(tmp_path: Path):
    Image.frombytes("F", (2, 1), struct.pack("=2f", 0.0, 0.25)).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0][0, 0, 1, 0] == 0.25
    Image.frombytes("F", (2, 1), struct.pack("=2f", 0.0, float("nan"))).save(tmp_path / "b.tiff")
    with pytest.raises(FileFormatError, match="greyscale values"):
        read_image(tmp_path / "b.tiff")


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk_is_not_inverted(tmp_path: Path, suffix: str):
    cmyk = Image.new("CMYK", (32, 16), (0, 255, 255, 0))  # red
    cmyk.paste((255, 255, 255, 255), (16, 0, 32, 16))  # black
    cmyk.save(tmp_path / f"a.{suffix}")
    image, mask = read_image(tmp_path / f"a.{suffix}")
    torch.testing.assert_close(image[0, 8, 4], torch.tensor([1.0, 0, 0]), rtol=0, atol=0.03)
    torch.testing.assert_close(image[0, 8, 28], torch.zeros(3), rtol=0, atol=0.03)
    assert mask is None


def test_first_frame_of_an_animation_is_read(tmp_path: Path):
    frames = [Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image, _ = read_image(tmp_path / "a.gif")
    assert torch.equal(image[0, 0, 0], torch.tensor([1.0, 0, 0]))


def test_missing_file_and_folder_are_refused(tmp_path: Path):
    for path in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(InputError, match="which is none"):
            read_image(path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (b"\n <!DOCTYPE html><html>", "a web page"),
        (b"<HTML><body>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"hello", "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
    ],
)
def test_files_that_are_no_image_are_refused(tmp_path: Path, content: bytes, kind: str):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=kind):
        read_image(path)


def test_contents_are_read_as_the_file_is(tmp_path: Path, pil_image: Image.Image):
    rgba = pil_image.copy()
    rgba.putalpha(Image.frombytes("L", (5, 3), bytes(range(0, 255, 17))))
    rgba.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for one, other in zip(read_image(content, "x"), read_image(tmp_path / "a.png"), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert torch.equal(read_mask(content, "x"), read_mask(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "b/c, which is an empty file"),
        (b"<html>", "b/c, which is a web page"),
        (b"hello", "b/c, which cannot be read. The"),
        (png_header(20_000, 20_000), "at most 100 megapixels, got b/c:"),
    ],
)
def test_unfit_contents_are_refused_by_the_name_given(content: bytes, message: str):
    with pytest.raises(DreamCacheError, match=message):
        read_image(content, "b/c")


def test_errors_of_our_own_pass_an_open_image_unchanged(tmp_path: Path, pil_image: Image.Image):
    pil_image.save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^mine$"), open_image(tmp_path / "a.png"):
        raise InputError("mine")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated_file_is_refused(tmp_path: Path, kind: str):
    noise = torch.randint(0, 256, (90 * 70 * 3,), generator=torch.Generator().manual_seed(0))
    whole = io.BytesIO()
    Image.frombytes("RGB", (90, 70), bytes(noise.tolist())).save(whole, kind)
    for share in (0.1, 0.5, 0.9):
        path = tmp_path / f"cut-{share}"
        path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
        with pytest.raises(FileFormatError, match="damaged, cut short"):
            read_image(path)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(DAMAGED_KINDS), data=st.data())
def test_damaged_bytes_give_an_image_or_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
):
    whole = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(whole, kind, exif=exif)
    content = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a"
    path.write_bytes(content)
    try:
        image, _ = read_image(path)
    except DreamCacheError:
        return
    assert image.ndim == 4
    assert 0 <= image.min() <= image.max() <= 1


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_001, 10_000), (50_000, 2001)])
def test_huge_image_is_refused_from_its_header(tmp_path: Path, width: int, height: int):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"at most 100 megapixels, got huge\.png"):
            read_image(path)


@pytest.mark.parametrize(
    ("kind", "mode", "size", "limit"),
    [
        ("TIFF", "RGBA", (10_000, 6_001), 60),
        ("JPEG", "CMYK", (10_000, 5_001), 50),
        ("WEBP", "RGB", (8_000, 4_001), 32),
        ("JPEG2000", "RGB", (5_000, 4_001), 20),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats_whose_decoders_take_more_have_lower_limits(
    kind: str, mode: str, size: tuple[int, int], limit: int, tmp_path: Path
):
    Image.new(mode, size).save(tmp_path / "x", kind)
    with pytest.raises(InputError, match=f"at most {limit} megapixels, got x: {size[0]} x"):
        read_image(tmp_path / "x")


@pytest.mark.parametrize("limit", [None, 10, 10**12])
def test_huge_image_is_refused_whatever_limit_pillow_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(20_000, 20_000))
    with pytest.raises(InputError, match="at most 100 megapixels"):
        read_image(path)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pillow_warning_below_our_limit_does_not_leak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pil_image: Image.Image
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 15 pixels: Pillow warns
    pil_image.save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_image(tmp_path / "a.png")[0], tensor_of(pil_image))


def test_image_of_6000_by_6000_is_read_at_half_its_size(tmp_path: Path):
    Image.new("L", (6000, 6000), 255).save(tmp_path / "a.png", compress_level=1)
    image, _ = read_image(tmp_path / "a.png")
    assert image.shape == (1, 3000, 3000, 3)
    assert image.min() == 1


def test_mask_is_white_for_subject(tmp_path: Path):
    mask = Image.new("L", (4, 2))
    mask.putpixel((3, 0), 255)
    mask.putpixel((1, 1), 51)
    mask.save(tmp_path / "a.png")
    expected = torch.zeros(1, 2, 4)
    expected[0, 0, 3], expected[0, 1, 1] = 1, 0.2
    torch.testing.assert_close(read_mask(tmp_path / "a.png"), expected, rtol=0, atol=1e-7)
    assert read_mask(tmp_path / "a.png")[0, 0, 3] == 1


def test_transparent_parts_of_a_mask_are_not_subject(tmp_path: Path):
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    mask.save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_png_holds_image_and_text(tmp_path: Path, pil_image: Image.Image, dtype: torch.dtype):
    path = tmp_path / "a.png"
    metadata = {"prompt": "a r\u00e9d \u732b\nin snow", "seed": "7"}
    save_png(path, tensor_of(pil_image).to(dtype), metadata)
    assert torch.equal(read_image(path)[0], tensor_of(pil_image))
    with Image.open(path) as saved:
        assert saved.format == "PNG"
        assert saved.info == metadata
    assert os.listdir(tmp_path) == ["a.png"]


def test_mask_is_encoded_as_greyscale():
    mask = torch.tensor([[[0.0, 0.2, 1.0], [1.0, 0.0, 0.4]]])
    content = encode_png(mask)
    with Image.open(io.BytesIO(content)) as encoded:
        assert (encoded.mode, encoded.size) == ("L", (3, 2))
    torch.testing.assert_close(read_mask(content), mask, rtol=0, atol=1e-6)


def test_values_outside_the_range_are_clamped_on_saving(tmp_path: Path):
    save_png(tmp_path / "a.png", torch.tensor([-0.5, 0.5, 1.5]).reshape(1, 1, 1, 3), {})
    assert (read_image(tmp_path / "a.png")[0] * 255).flatten().tolist() == [0, 128, 255]


def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, pil_image: Image.Image, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(*_args: object, **_kwargs: object):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, tensor_of(pil_image), {})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (1, 3, 4, 4), (4, 4, 3), (1, 0, 4, 3)])
def test_misshapen_image_is_not_written(tmp_path: Path, shape: tuple[int, ...]):
    with pytest.raises(InputError, match="Expected one image"):
        save_png(tmp_path / "a.png", torch.zeros(shape), {})
    assert os.listdir(tmp_path) == []


def test_nan_is_not_written_as_black(tmp_path: Path):
    with pytest.raises(InputError, match="NaN"):
        save_png(tmp_path / "a.png", torch.full((1, 4, 4, 3), float("nan")), {})
    assert os.listdir(tmp_path) == []


def test_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="existing folder"):
        save_png(tmp_path / "none" / "a.png", torch.zeros(1, 4, 4, 3), {})


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, kind: int, row: bytes, clear: bytes) -> bytes:
    """16 x 16 pixels, each row alike, with a transparent colour."""
    header = struct.pack(">IIBBBBB", 16, 16, depth, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 16)
    chunks = ((b"IHDR", header), (b"tRNS", clear), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def two(form: str, left: tuple[int, ...], right: tuple[int, ...]) -> bytes:
    return struct.pack(form, *left) * 8 + struct.pack(form, *right) * 8


@pytest.mark.parametrize(
    "content",
    [
        png(1, 0, b"\x00\xff", b"\0\1"),
        png(2, 0, b"\x55\x55\xff\xff", b"\0\3"),
        png(2, 0, b"\xff\xff\x55\x55", b"\0\1"),
        png(4, 0, b"\x55" * 4 + b"\xee" * 4, b"\0\x0e"),
        png(8, 0, bytes([0] * 8 + [200] * 8), b"\0\xc8"),
        png(16, 0, two(">H", (51401,), (51400,)), struct.pack(">H", 51400)),
        png(16, 0, two(">H", (1,), (0,)), b"\0\0"),
        png(8, 2, two(">BBB", (0, 0, 0), (200, 7, 0)), struct.pack(">HHH", 200, 7, 0)),
        png(16, 2, two(">HHH", (0, 0, 0), (51401, 7, 0)), struct.pack(">HHH", 51401, 7, 0)),
    ],
    ids=["1", "2", "2 dark", "4", "8", "16", "16 black", "rgb 8", "rgb 16"],
)
def test_transparent_colour_of_a_png_is_transparent_at_every_depth(content: bytes):
    image, alpha = read_image(content)
    assert alpha is not None
    assert alpha[0, 3].tolist() == [1.0] * 8 + [0.0] * 8
    assert image.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("bits", "sample_format", "photometric"),
    [(16, 1, 0), (32, 3, 0), (12, 1, 1), (8, 2, 1), (16, 2, 1)],
    ids=["white is 0", "white is 0, floats", "12 bits", "signed", "signed, 16 bits"],
)
def test_tiff_whose_values_pillow_takes_for_others_is_refused(
    bits: int, sample_format: int, photometric: int
):
    """A mask of 16 bits with white as 0 was read inverted, 12 bits 16 times too dark."""
    entries = [
        *((256, 2), (257, 1), (258, bits), (259, 1), (262, photometric)),
        *((273, 126), (277, 1), (278, 1), (279, bits // 4), (339, sample_format)),
    ]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    content = b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4) + bytes(bits // 4)
    with pytest.raises(FileFormatError, match="with black as 0"):
        read_image(content.ljust(256, b"\0"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_image_above_16_megapixels_is_shrunk_by_a_whole_number(
    mode: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "MAX_KEPT_PIXELS", 64)
    image = Image.new("L", (20, 12), 0)
    image.paste(255, (0, 0, 3, 3))
    stream = io.BytesIO()
    deep = image.convert("I").point(lambda value: value * 257) if mode == "I;16" else image
    deep.convert(mode).save(stream, format="PNG")
    read, _ = read_image(stream.getvalue())
    assert read.shape == (1, 6, 10, 3)
    assert read[0, 0, :3, 0].tolist() == pytest.approx([1, 0.5, 0], abs=0.01)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_large_image_is_upright_and_its_transparent_colour_is_averaged(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "MAX_KEPT_PIXELS", 64)
    image, stream, exif = Image.new("RGB", (20, 12), "red"), io.BytesIO(), Image.Exif()
    image.paste("blue", (0, 0, 3, 12))
    exif[0x0112] = 6
    clear = {"transparency": (0, 0, 255)} if kind == "PNG" else {}
    image.save(stream, format=kind, exif=exif, **clear)
    read, alpha = read_image(stream.getvalue())
    assert read.shape == (1, 10, 6, 3)
    if kind == "PNG":
        assert alpha is not None
        assert alpha[0, :, 0].tolist() == pytest.approx([0, 0.5, *[1] * 8], abs=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode", "size", "options"),
    [
        ("PNG", "RGBA", (10_000, 10_000), {"compress_level": 1}),
        ("JPEG", "RGB", (10_000, 10_000), {"progressive": True}),
        ("JPEG", "CMYK", (10_000, 5_000), {"progressive": True}),
        (
            "TIFF",
            "RGBA",
            (10_000, 6_000),
            {"compression": "tiff_deflate", "tiffinfo": {278: 6_000}},
        ),
        ("WEBP", "RGBA", (8_000, 4_000), {"method": 0}),
        ("JPEG2000", "RGBA", (5_000, 4_000), {}),
        ("AVIF", "RGBA", (8_000, 5_000), {"speed": 10}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_largest_images_take_less_than_512_mib(
    kind: str, mode: str, size: tuple[int, int], options: dict[str, Any], tmp_path: Path
):
    """100 megapixels took 808 MiB as RGBA, 1,843 as JPEG 2000."""
    Image.new(mode, size, (200, 90, 30, 40)[: len(mode)]).save(tmp_path / "x", kind, **options)
    script = """
import resource, sys
from dreamcache_core.images.files import image_endings, read_image
image_endings()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_image(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = [sys.executable, "-c", script, tmp_path / "x"]
    assert float(subprocess.run(run, capture_output=True, check=True).stdout) < 512


def test_thin_image_above_16_megapixels_keeps_its_shorter_side(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MAX_KEPT_PIXELS", 64)
    stream = io.BytesIO()
    Image.new("RGB", (900, 1)).save(stream, format="PNG")
    assert read_image(stream.getvalue())[0].shape == (1, 1, 225, 3)
