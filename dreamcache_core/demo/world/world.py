"""The demo world: subjects in colours that no caption names, drawn in scenes that captions describe."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from .backgrounds import BACKGROUNDS, Colour, paint_background
from .patterns import PATTERNS
from .shapes import SHAPES, UNSEEN_SHAPES

Size = Literal["", "tiny", "large"]
Place = Literal["", "left", "right", "top", "bottom"]

IMAGE_SIZE = 128
"""Side of an image in pixels."""

PAPER = "paper"
"""Background of reference images."""

SCENE_BACKGROUNDS = tuple(name for name in BACKGROUNDS if name != PAPER)

PALETTE: Sequence[Colour] = (
    (214, 40, 40),
    (245, 130, 32),
    (250, 215, 50),
    (150, 205, 50),
    (30, 130, 60),
    (30, 175, 165),
    (110, 195, 245),
    (40, 80, 205),
    (120, 60, 180),
    (210, 60, 180),
    (250, 165, 195),
    (125, 75, 40),
    (245, 245, 240),
    (90, 90, 100),
)
"""Colours that subjects are made of; each subject's own are up to ``COLOUR_SPREAD`` away in every channel."""

COLOUR_SPREAD = 12
OUTLINE: Colour = (30, 25, 35)
OUTLINE_WIDTH = 0.016
OVERSAMPLING = 2
CENTRE = 0.5
HALF_SIZES = {"": 0.29, "tiny": 0.19, "large": 0.39}
PLACES = {
    "": (0.5, 0.53),
    "left": (0.32, 0.53),
    "right": (0.68, 0.53),
    "top": (0.5, 0.32),
    "bottom": (0.5, 0.69),
}
SIZE_WORDS = {"": ("",), "tiny": ("tiny", "small"), "large": ("large", "big")}
PLACE_WORDS = {
    "": ("",),
    "left": ("left", "on the left"),
    "right": ("right", "on the right"),
    "top": ("top", "at the top"),
    "bottom": ("bottom", "at the bottom"),
}
UNSEEN_SHARE = 8
PATTERN_WORD_RATE = 0.5
MIRRORED_RATE = 0.1


@dataclass(frozen=True)
class Subject:
    """One individual: nothing but its image tells its colours.

    Attributes:
        shape: A key of ``SHAPES``.
        pattern: A key of ``PATTERNS``.
        colours: RGB colours, as many as the pattern is drawn with.
        kinds: Index into ``PALETTE`` that each colour was drawn near.
    """

    shape: str
    pattern: str
    colours: tuple[Colour, ...]
    kinds: tuple[int, ...]

    @property
    def is_unseen(self) -> bool:
        """Whether adapter training leaves this subject out: its shape, or its pattern in these kinds of colours."""
        return self.shape in UNSEEN_SHAPES or is_unseen_combination(self.pattern, self.kinds)


@dataclass(frozen=True)
class Scene:
    """What a caption says about an image besides the subject's shape.

    Attributes:
        background: A key of ``BACKGROUNDS``.
        size: How large the subject is; empty means middling.
        place: Where the subject is; empty means the middle.
        has_twin: Whether the subject is there twice, side by side; such scenes have neither size nor place.
    """

    background: str
    size: Size = ""
    place: Place = ""
    has_twin: bool = False


@dataclass(frozen=True)
class Pose:
    """Where a subject is in an image; lengths are fractions of its side.

    Attributes:
        x: Centre, from the left.
        y: Centre, from the top.
        half_size: Half of the side of the subject's square.
        angle: Turn in degrees, clockwise.
        flipped: Whether left and right are exchanged.
    """

    x: float
    y: float
    half_size: float
    angle: float = 0.0
    flipped: bool = False


def is_unseen_combination(pattern: str, kinds: Sequence[int]) -> bool:
    """Whether adapter training leaves out this pattern in these kinds of colours.

    Args:
        pattern: A key of ``PATTERNS``.
        kinds: Indices into ``PALETTE``, in any order.
    """
    name = f"{pattern}:{','.join(str(kind) for kind in sorted(kinds))}"
    return zlib.crc32(name.encode()) % UNSEEN_SHARE == 0


def draw_subject(
    random: np.random.Generator, shape: str | None = None, pattern: str | None = None
) -> Subject:
    """Draw an individual by lot.

    Args:
        random: Source of everything random.
        shape: Its shape, or None for any.
        pattern: Its pattern, or None for any.
    """
    shape = shape or str(random.choice(list(SHAPES)))
    pattern = pattern or str(random.choice(list(PATTERNS)))
    count = int(random.choice(PATTERNS[pattern].colours))
    kinds = tuple(random.choice(len(PALETTE), size=count, replace=False).tolist())
    spread = random.integers(-COLOUR_SPREAD, COLOUR_SPREAD + 1, size=(count, 3))
    colours = np.clip(np.array([PALETTE[kind] for kind in kinds]) + spread, 0, 255)
    return Subject(shape, pattern, tuple((r, g, b) for r, g, b in colours.tolist()), kinds)


def draw_known_subject(random: np.random.Generator, shape: str | None = None) -> Subject:
    """Draw by lot one of the subjects that adapter training may show.

    Args:
        random: Source of everything random.
        shape: Its shape, one of ``SHAPES`` but for ``UNSEEN_SHAPES``, or None for any of these.
    """
    while (subject := draw_subject(random, shape)).is_unseen:
        pass
    return subject


def draw_scene(
    random: np.random.Generator, backgrounds: Sequence[str] = SCENE_BACKGROUNDS
) -> Scene:
    """Draw a scene by lot: half of them say neither size nor place.

    Args:
        random: Source of everything random.
        backgrounds: Names to choose from.
    """
    background = str(random.choice(list(backgrounds)))
    lot = random.random()
    if lot < 0.2:
        return Scene(background, size=random.choice(["tiny", "large"]))
    if lot < 0.5:
        return Scene(background, place=random.choice(["left", "right", "top", "bottom"]))
    return Scene(background)


def draw_pose(random: np.random.Generator, scene: Scene) -> Pose:
    """Draw where the subject of a scene is; only references are mirrored."""
    x, y = (PLACES[scene.place] + random.uniform(-0.025, 0.025, size=2)).tolist()
    half_size = HALF_SIZES[scene.size] * random.uniform(0.93, 1.07)
    return Pose(x, y, half_size, random.uniform(-8, 8))


def draw_reference_pose(random: np.random.Generator) -> Pose:
    """Draw a pose that fills the square as references should (METHOD.md section 7): about 70 to 90 %."""
    half_size = random.uniform(0.33, 0.41)
    x, y = (CENTRE + random.uniform(-0.02, 0.02, size=2)).tolist()
    return Pose(x, y, half_size, random.uniform(-15, 15), random.random() < MIRRORED_RATE)


def subject_masks(
    subject: Subject, pose: Pose, size: int = IMAGE_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Find the pixels of a subject: all of it, and what of it shows its pattern.

    Args:
        subject: Whose shape it is.
        pose: Where it is.
        size: Side of the image in pixels.

    Returns:
        Two boolean arrays of shape (size, size): silhouette with its outline; silhouette without outline and marks.
    """
    shape = SHAPES[subject.shape]
    outline = max(1, round(OUTLINE_WIDTH * size))
    whole, inner = Image.new("1", (size, size)), Image.new("1", (size, size))
    drawn_whole, drawn_inner = ImageDraw.Draw(whole), ImageDraw.Draw(inner)
    for points in shape.body:
        corners = _placed(points, pose, size)
        drawn_whole.polygon(corners, fill=1)
        drawn_whole.line([*corners, *corners[:2]], fill=1, width=2 * outline, joint="curve")
        drawn_inner.polygon(corners, fill=1)
    for points in shape.holes:
        corners = _placed(points, pose, size)
        drawn_inner.polygon(corners, fill=0)
        drawn_inner.line([*corners, *corners[:2]], fill=0, width=2 * outline, joint="curve")
        drawn_whole.polygon(corners, fill=0)
    for points in shape.marks:
        drawn_inner.polygon(_placed(points, pose, size), fill=0)
    return np.asarray(whole), np.asarray(inner)


def in_subject_frame(x: np.ndarray, y: np.ndarray, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Find points of an image in a subject's own square, from -1 to 1.

    Args:
        x: From the left, as a fraction of the image's side.
        y: From the top, likewise, of the same shape.
        pose: Where the subject is.
    """
    right, down = (x - pose.x) / pose.half_size, (y - pose.y) / pose.half_size
    cosine, sine = np.cos(np.radians(pose.angle)), np.sin(np.radians(pose.angle))
    x, y = cosine * right + sine * down, cosine * down - sine * right
    return (-x if pose.flipped else x), y


def render(
    subject: Subject, scene: Scene, pose: Pose, random: np.random.Generator, *twins: Pose
) -> Image.Image:
    """Draw a subject in a scene.

    Args:
        subject: Who is in it.
        scene: The background; its size and place are the pose's business.
        pose: Where the subject is.
        random: Source of what varies in the background.
        twins: Where the subject is once more, if it is.

    Returns:
        RGB image of 128 x 128.
    """
    size = IMAGE_SIZE * OVERSAMPLING
    image = np.array(paint_background(scene.background, size, random))
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    colours = np.array(subject.colours, dtype=np.uint8)
    for place in (pose, *twins):
        whole, inner = subject_masks(subject, place, size)
        image[whole] = OUTLINE
        frame = in_subject_frame(x[inner], y[inner], place)
        image[inner] = colours[PATTERNS[subject.pattern].draw(*frame, len(colours))]
    return Image.fromarray(image).reduce(OVERSAMPLING)


def render_cutout(subject: Subject, random: np.random.Generator) -> Image.Image:
    """Draw a reference image (METHOD.md section 3): the subject on white, in a pose of its own.

    Args:
        subject: Who is in it.
        random: Source of the pose.

    Returns:
        RGBA image of 128 x 128; its alpha channel cuts the subject out.
    """
    return _render_marked(subject, Scene(PAPER), draw_reference_pose(random), random)


def draw_training_image(
    random: np.random.Generator, shape: str | None = None
) -> tuple[Image.Image, str]:
    """Draw an image to train adapters on by lot, none of the held-out subjects.

    Args:
        random: Source of everything random.
        shape: The subject's shape, one of ``SHAPES`` but for ``UNSEEN_SHAPES``, or None for any of these.

    Returns:
        RGBA image of 128 x 128, whose alpha channel tells where the subject is in its scene, and the caption, which names
        neither colours nor pattern.
    """
    subject, scene = draw_known_subject(random, shape), draw_scene(random)
    image = _render_marked(subject, scene, draw_pose(random, scene), random)
    return image, write_caption(subject, scene, random, name_pattern=False)


def write_caption(
    subject: Subject, scene: Scene, random: np.random.Generator, name_pattern: bool | None = None
) -> str:
    """Describe an image in plain English; the colours stay unsaid.

    Args:
        subject: Its shape, and now and then its pattern, are named.
        scene: Background, size, place and twin are named.
        random: Chooses the wording.
        name_pattern: Whether the pattern is named; None leaves it to chance.

    Returns:
        ``a striped mug on the grass, left``.
    """
    if name_pattern is None:
        name_pattern = bool(random.random() < PATTERN_WORD_RATE)
    size = str(random.choice(SIZE_WORDS[scene.size]))
    pattern = PATTERNS[subject.pattern].word if name_pattern else ""
    phrase = str(random.choice(BACKGROUNDS[scene.background].phrases))
    place = str(random.choice(PLACE_WORDS[scene.place]))
    # the shipped text encoder learnt these very words: "picture" is a token of it, "image" is none
    opening = str(random.choice(["", "", "a picture of ", "a drawing of "]))
    thing = with_article(" ".join(word for word in (size, pattern, subject.shape) if word))
    twin = " and its twin" if scene.has_twin else ""
    return f"{opening}{thing}{twin} {phrase}{place and f', {place}'}"


def _render_marked(
    subject: Subject, scene: Scene, pose: Pose, random: np.random.Generator
) -> Image.Image:
    """Draw a subject in a scene; the alpha channel tells where it is."""
    image = render(subject, scene, pose, random)
    whole, _ = subject_masks(subject, pose, IMAGE_SIZE * OVERSAMPLING)
    image.putalpha(Image.fromarray(whole.astype(np.uint8) * 255).reduce(OVERSAMPLING))
    return image


def with_article(thing: str) -> str:
    """Put "a" or "an" before a thing."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _placed(points: np.ndarray, pose: Pose, size: int) -> list[tuple[float, float]]:
    """Move a shape's points into an image, in pixels."""
    x, y = points.T
    if pose.flipped:
        x = -x
    cosine, sine = np.cos(np.radians(pose.angle)), np.sin(np.radians(pose.angle))
    right, down = cosine * x - sine * y, sine * x + cosine * y
    left, top = (pose.x + pose.half_size * right) * size, (pose.y + pose.half_size * down) * size
    return list(zip(left.tolist(), top.tolist(), strict=True))
