"""Several images on one sheet, and the thumbnails in a saved reference; knows nothing of models."""

import io
from bisect import bisect
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..errors import FileFormatError
from .files import open_image
from .tensors import image_to_tensor, tensor_to_image

CELL_PX = 256
THUMBNAIL_PX, THUMBNAILS_IN_ROW = 128, 4


def encode_thumbnails(images: Tensor) -> tuple[bytes, ...]:
    """Return small JPEGs of images, a few kilobytes each.

    Args:
        images: (images, height, width, 3), any float dtype, in [0, 1]; values outside are clamped.

    Raises:
        InputError: The images are misshapen or not finite.
    """
    return tuple(_encode_thumbnail(image) for image in images.split(1))


def read_thumbnails(thumbnails: Sequence[bytes], name: str) -> Tensor:
    """Lay what ``encode_thumbnails`` returned out on one sheet, at most four in a row.

    Args:
        thumbnails: At least one.
        name: What to call their file in messages.

    Returns:
        The sheet, (1, height, width, 3), float32 in [0, 1].

    Raises:
        FileFormatError: One is damaged, no image or too large; a file of strangers may hold anything.
    """
    images: list[Tensor] = []
    for thumbnail in thumbnails:
        with open_image(thumbnail, name) as image:
            if max(image.size) > THUMBNAIL_PX:
                raise FileFormatError(
                    f"{name} holds a thumbnail of {image.width} x {image.height} pixels; expected at most {THUMBNAIL_PX} a side. "
                    "Save the reference again."
                )
            images.append(image_to_tensor(image.convert("RGB")))
    rows = [images[i : i + THUMBNAILS_IN_ROW] for i in range(0, len(images), THUMBNAILS_IN_ROW)]
    return contact_sheet(rows, cell_px=THUMBNAIL_PX)


def sheet_cell(image: Tensor, cell_px: int = CELL_PX) -> Image.Image:
    """Shrink or enlarge an image to fit a square cell of a sheet; what many images are kept as until they are laid out.

    Args:
        image: (1, height, width, 3) in [0, 1].
        cell_px: Side of the cell, pixels.

    Raises:
        InputError: The image is misshapen or not finite.
    """
    return ImageOps.pad(tensor_to_image(image), (cell_px, cell_px), color="white")


def contact_sheet(
    rows: Sequence[Sequence[Tensor | Image.Image]],
    captions: Sequence[Sequence[str]] | None = None,
    *,
    cell_px: int = CELL_PX,
) -> Tensor:
    """Lay images out in a grid on white, each shrunk or enlarged to fit its square cell.

    Args:
        rows: The images by row, at least one, each (1, height, width, 3) in [0, 1] or what ``sheet_cell`` made of it; sizes
            may differ, and rows may be of different length.
        captions: Text under each image, nested as ``rows``; None leaves no room for text.
        cell_px: Side of a cell, pixels.

    Returns:
        The sheet, (1, height, width, 3), float32 in [0, 1].

    Raises:
        InputError: An image is misshapen or not finite.
    """
    text_px = 0 if captions is None else 20
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * cell_px, len(rows) * (cell_px + text_px)), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            x, y = j * cell_px, i * (cell_px + text_px)
            cell = image if isinstance(image, Image.Image) else sheet_cell(image, cell_px)
            sheet.paste(cell, (x, y))
            if captions is not None:
                _write_caption(sheet, captions[i][j], (x, y + cell_px), cell_px)
    return image_to_tensor(sheet)


def _encode_thumbnail(image: Tensor) -> bytes:
    small, stream = tensor_to_image(image), io.BytesIO()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    small.save(stream, format="JPEG", quality=85)
    return stream.getvalue()


def _write_caption(sheet: Image.Image, text: str, corner: tuple[int, int], width: int) -> None:
    """Write one line below a cell, cut to the cell's width."""
    # Pillow's built-in bitmap font, used where FreeType is missing, holds Latin-1 only.
    text = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    if len(text) > width or draw.textlength(text, font=font) > width - 8:
        text = text[:width]  # no letter is narrower than a pixel
        sizes = range(1, len(text) + 1)
        fits = bisect(sizes, width - 8, key=lambda n: draw.textlength(f"{text[:n]}...", font=font))
        text = f"{text[:fits]}..."
    draw.text((corner[0] + 4, corner[1] + 4), text, fill="black", font=font)
