"""Where nodes stand and wires run: columns of nodes, and lanes above them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .definitions import Json, is_widget

GUTTER_PX, GAP_PX, AIR_PX, LANE_PX = 70, 70, 110, 26
"""Between columns; below a node, down to the next one's title and with it; the same where the node grows; between lanes."""

IMAGES = {
    "PreviewImage",
    "SaveImage",
    "LoadImage",
    "DreamCacheDemoReference",
    "DreamCacheDemoPhotos",
    "DreamCacheFromPhoto",
}
PATHS = {"DreamCacheSaveReference", "DreamCacheSaveAdapters"}
"""Nodes whose report names a file: it takes several lines."""
IMAGE_PX, TEXT_PX, SLOT_PX, WIDGET_PX, REPORT_PX = 280, 110, 22, 30, 60
LETTER_PX, LINE_PX = 7.2, 22

Wire = tuple[int, tuple[int, int], "Box", "Box"]
"""Number, the output that it starts at (node, output), and the boxes at both ends."""


@dataclass
class Box:
    """A node's place, in pixels; ``left`` and ``top`` are known once all are placed."""

    column: int
    width: int
    height: int
    below: int
    left: int = 0
    top: int = 0


@dataclass
class Lane:
    """A point that wires run through; the page calls it a reroute.

    Attributes:
        id: Number in the file.
        pos: Pixels.
        parent: The point before it, towards the output.
        links: All that run through it.
        ends: Those that leave the lane here, for their input.
    """

    id: int
    pos: tuple[int, int]
    parent: int | None
    links: list[int]
    ends: list[int] = field(default_factory=list[int])

    def to_json(self) -> Json:
        """The point's entry in the file."""
        parent = {} if self.parent is None else {"parentId": self.parent}
        return {"id": self.id, **parent, "pos": list(self.pos), "linkIds": self.links}


def box_of(kind: str, definition: Json, inputs: dict[str, Any], column: int, width_px: int) -> Box:
    """What a node needs in either rendering, with the image or report that it will show."""
    if kind == "MarkdownNote":
        return Box(column, width_px, _text_height(inputs["text"], width_px), GAP_PX)
    widgets = [given for given in definition["inputs"] if is_widget(given)]
    sockets = max(len(definition["inputs"]) - len(widgets), len(definition["outputs"]))
    height = 10 + SLOT_PX * sockets
    for given in widgets:
        height += TEXT_PX if given.get("multiline") else WIDGET_PX
        height += WIDGET_PX * bool(given.get("control_after_generate"))
    reports = kind.startswith("DreamCache")
    height += IMAGE_PX * (kind in IMAGES) + REPORT_PX * (reports + 2 * (kind in PATHS))
    return Box(column, width_px, height, AIR_PX if reports or kind in IMAGES else GAP_PX)


def place(boxes: Sequence[Box]) -> None:
    """Put each column beside the last one and each box below the one before it."""
    left = 0
    for column in range(max(box.column for box in boxes) + 1):
        top, here = 0, [box for box in boxes if box.column == column]
        for box in here:
            box.left, box.top = left, top
            top += box.height + box.below
        left += max(box.width for box in here) + GUTTER_PX


def lanes(wires: Iterable[Wire]) -> list[Lane]:
    """Lead each wire that would pass behind a column through a lane of its output's own above all nodes."""
    by_output: dict[tuple[int, int], list[Wire]] = defaultdict(list)
    for wire in wires:
        if wire[3].column - wire[2].column > 1:
            by_output[wire[1]].append(wire)
    found: list[Lane] = []
    for number, bundle in enumerate(by_output.values()):
        found += _lane(bundle, number, len(found))
    return found


def _lane(bundle: list[Wire], number: int, last_id: int) -> list[Lane]:
    """One output's lane: up beside its node, along, and down before each column that it serves."""
    y, start, shift = -80 - LANE_PX * number, bundle[0][2], 8 * (number % 4)
    x, links = start.left + start.width + 20 + shift, [wire[0] for wire in bundle]
    corners: list[tuple[int, int]] = [(x, y)]
    if (
        start.top
    ):  # a long way up: a corner beside the output keeps the curve out of the next column
        corners.insert(0, (x, start.top + 14 + SLOT_PX * bundle[0][1][1]))
    points: list[Lane] = []

    def add(pos: tuple[int, int], through: list[int], ends: list[int]) -> None:
        parent = points[-1].id if points else None
        points.append(Lane(last_id + len(points) + 1, pos, parent, through, ends))

    for corner in corners:
        add(corner, links, [])
    for left in sorted({wire[3].left for wire in bundle}):
        through = [wire[0] for wire in bundle if wire[3].left >= left]
        add((left - 20 - shift, y), through, [wire[0] for wire in bundle if wire[3].left == left])
    return points


def _text_height(text: str, width: int) -> int:
    """Height of a note, by the letters that a line holds."""
    letters = (width - 40) / LETTER_PX
    lines = sum(1 + int(len(line) / letters) for line in text.split("\n") if line)
    return 60 + LINE_PX * (lines + text.count("\n\n"))
