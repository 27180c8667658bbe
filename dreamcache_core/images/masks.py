"""What a user's mask marks, whichever way round it is, and how much of an image is subject; knows no files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import SUBJECT_THRESHOLD, check_image, check_mask, subject_opacity

MARKS = ("auto", "subject", "background")
"""What 1 in a mask may stand for; ``auto`` decides by the mask."""

PLACEHOLDER_SIDE_PX = 64

BORDER_SHARE = 0.02
"""Width of an image's border, as a share of its shorter side."""

MOST_BACKGROUND = 0.99
"""A mask that covers more than this share of an image leaves no subject outside of it."""

WHITE_FROM = 0.95
"""A border is white where all channels are at least this."""

STRONG_FROM = 0.9
"""A mask whose largest value is below this was saved in other values than black and white."""

TURNED = "the mask was turned round"
EMPTY = "the mask is empty"
NOTHING_PAINTED = "nothing is painted in the mask"
UNSURE = "the mask was taken for the subject; if it marks the background, set mask_marks"


@dataclass(frozen=True, eq=False)
class Subject:
    """Where the subject of each image is.

    Attributes:
        opacity: (batch or 1, height, width), float32 in [0, 1], 1 = subject, at the images' size; ``None``: everywhere.
        note: What was made of mask and transparency, in words for the user.
    """

    opacity: Tensor | None
    note: str


def find_subject(image: Tensor, mask: Tensor | None = None, marks: str = "auto") -> Subject:
    """Tell where the subject of each image is, by the image's transparency and a mask of either kind.

    Args:
        image: (batch, height, width, 1, 3 or 4 channels) in [0, 1]; a 4th is alpha, 1 = opaque = subject.
        mask: (batch or 1, height, width) or (height, width) in [0, 1], or ``None``. It is multiplied with alpha.
        marks: What 1 in the mask stands for, see ``given_mask``.

    Returns:
        The subject; a mask that marks everything is none.

    Raises:
        InputError: Image or mask is misshapen or out of range, or the mask is of another aspect or batch.
    """
    check_image(image)
    given, notes = given_mask(mask, marks)
    opacity = subject_opacity(image, given)
    if opacity is None or bool((opacity >= 1).all()):
        return Subject(None, _whole_image(mask, given, notes, shows_background(image)))
    shares = [round(100 * float(row.mean())) for row in opacity]
    covers = " to ".join(dict.fromkeys((f"{min(shares)}", f"{max(shares)}")))
    words = [*in_words(notes), f"subject covers {covers} %", weak_mask(opacity)]
    return Subject(opacity, ", ".join(filter(None, words)))


def given_mask(mask: Tensor | None, marks: str = "subject") -> tuple[Tensor | None, list[str]]:
    """Return the mask of a ComfyUI input as one that marks the subject with 1.

    Args:
        mask: (batch, height, width) or (height, width) in [0, 1], or ``None``.
        marks: What 1 in it stands for: ``subject``, ``background``, or ``auto``. ``auto`` decides for each row: what covers
            most of the border, and more of it than of the rest, marks the background, as Load Image's mask of a
            cut-out does; an empty one is none; any other marks the subject.

    Returns:
        The mask, (batch or 1, height, width), float32; ``None`` also for what Load Image gives with an image that has no
        alpha channel: 64 x 64, all zero. And a note on each row, for ``in_words``.

    Raises:
        InputError: The mask is misshapen, not finite or outside [0, 1].
    """
    if mask is None:
        return None, []
    mask = check_mask(mask)
    if mask.shape[-2:] == (PLACEHOLDER_SIDE_PX, PLACEHOLDER_SIDE_PX) and not bool(mask.any()):
        return None, []
    if marks != "auto":
        return (1 - mask if marks == "background" else mask), [""] * len(mask)
    rows, notes = zip(*map(_settle, mask), strict=True)
    return torch.stack(rows), list(notes)


def in_words(notes: Sequence[str]) -> list[str]:
    """Name each different note once, with the number of images that it is about where these are not all."""
    counts = Counter(note for note in notes if note)
    return [
        note if count == len(notes) else f"{note} ({count} of {len(notes)} images)"
        for note, count in counts.items()
    ]


def on_white(image: Tensor) -> Tensor:
    """Lay images on white where they are transparent.

    Args:
        image: As ``check_image`` accepts them, (batch, height, width, 1, 3 or 4 channels).

    Returns:
        (batch, height, width, 3); where nothing is transparent the colours as they are.
    """
    colour, alpha = image[..., :3].expand(-1, -1, -1, 3), image[..., 3:].clamp(0, 1)
    return colour if bool((alpha == 1).all()) else colour * alpha + 1 - alpha


def shows_background(image: Tensor) -> bool:
    """Whether the border of an image, (batch, height, width, channels), is anything but white, which references are laid on."""
    border = image[:, _border(*image.shape[1:3]), :3]  # -> (batch, pixels, channels)
    return bool((border < WHITE_FROM).any())


def seems_turned(mask: Tensor) -> bool:
    """Whether a mask, (height, width) in [0, 1], marks the background: most of the border, and more of it than of the rest."""
    border, area = _cover(mask)
    return border > max(area, 0.5) and area <= MOST_BACKGROUND


def weak_mask(mask: Tensor) -> str:
    """Say that masks, (batch, height, width) in [0, 1], nowhere reach white; empty where they do or are black."""
    highest = float(mask.max())
    if not 0 < highest < STRONG_FROM:
        return ""
    return (
        f"the mask has values up to {highest:.2g} of 1, which fades the subject; save white as 255."
    )


def _cover(mask: Tensor) -> tuple[float, float]:
    """How much of the border a mask covers, and of all."""
    return float(mask[_border(*mask.shape)].mean()), float(mask.mean())


def _settle(mask: Tensor) -> tuple[Tensor, str]:
    """Decide what one mask, (height, width), marks."""
    if float(mask.max()) < SUBJECT_THRESHOLD:
        return torch.ones_like(mask), EMPTY
    if seems_turned(mask):
        return 1 - mask, TURNED
    border, area = _cover(mask)
    is_unsure = border > min(area, 0.5) and bool((mask < 1).any())
    return mask, UNSURE if is_unsure else ""


def _border(height: int, width: int) -> Tensor:
    """Pixels of the border, bool (height, width)."""
    band = max(1, round(BORDER_SHARE * min(height, width)))
    border = torch.ones((height, width), dtype=torch.bool)
    border[band:-band, band:-band] = False
    return border


def _whole_image(
    mask: Tensor | None, given: Tensor | None, notes: Sequence[str], has_background: bool
) -> str:
    """Say why all of an image counts as its subject, by the mask as it came and as it was taken."""
    if given is None and not has_background:
        return "no mask, white background"
    if mask is None:
        cause = "no mask"
    elif given is None:
        cause = NOTHING_PAINTED
    else:
        cause = EMPTY if EMPTY in notes else "the mask covers all of the image"
    cure = (
        " (paint the subject: right-click the image, Open in MaskEditor)" if given is None else ""
    )
    return f"{cause}: the background is in the reference{cure}"
