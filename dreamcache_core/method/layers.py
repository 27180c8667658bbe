"""Which layers of a U-Net are cached and adapted, and which U-Nets belong together.

Knows module trees only through ``AttentionSite``; the back ends make those.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import check_range
from ..errors import MismatchError

Part = Literal["encoder", "middle", "decoder"]

LAYER_NAME = "(?:input_blocks|output_blocks)[.][0-9]{1,3}[.][0-9]{1,3}|middle_block[.][0-9]{1,3}"
"""Regular expression of a canonical layer name."""

logger = logging.getLogger(__name__)

FAMILY_OF_CONTEXT_WIDTH = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
FAMILY_NAMES = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1", "sdxl": "SDXL"}


def family_of(context_width: int) -> str:
    """Name the model family whose text states have this width.

    Args:
        context_width: Channels of the text states that the U-Net attends to.

    Returns:
        ``sd15`` (768), ``sd21`` (1024), ``sdxl`` (2048), else ``custom-<width>``.
    """
    return FAMILY_OF_CONTEXT_WIDTH.get(context_width, f"custom-{context_width}")


def check_layer_names(names: object) -> list[str]:
    """Refuse what a file gives for layer names.

    Args:
        names: To be a list of canonical layer names.

    Returns:
        The names.

    Raises:
        TypeError: It is no list.
        ValueError: It holds another name; the message says which.
    """
    if not isinstance(names, list):
        raise TypeError("layers are no list")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(LAYER_NAME, name):
            raise ValueError(f"unknown layer {str(name)[:80]!r}")
    return names


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention module of a U-Net (SpatialTransformer, Transformer2DModel).

    Attributes:
        name: Canonical name, the ldm one: ``output_blocks.4.1``.
        native_name: Name in this U-Net's own module tree.
        part: Where in the U-Net it stands.
        module: The attention module; its input is the feature map that a reference cache keeps.
    """

    name: str
    native_name: str
    part: Part
    module: nn.Module

    @property
    def block(self) -> Any:
        """The transformer block that an adapter sits on: the first of the module."""
        blocks: Any = self.module.transformer_blocks
        return blocks[0]

    @property
    def channels(self) -> int:
        """Width of the hidden states."""
        return int(self.block.norm1.normalized_shape[-1])

    @property
    def heads(self) -> int:
        """Number of heads of the self-attention; the adapter uses as many."""
        return int(self.block.attn1.heads)

    @property
    def context_width(self) -> int:
        """Channels of the text states."""
        return int(self.block.attn2.to_k.in_features)

    def hook_input(self, read: Callable[[Tensor], None]) -> RemovableHandle:
        """Call a function with each feature map that enters the module, (batch, channels, height, width)."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            read(args[0] if args else kwargs["hidden_states"])

        return self.module.register_forward_pre_hook(hook, with_kwargs=True)


def default_layers(sites: Sequence[AttentionSite]) -> tuple[str, ...]:
    """Choose the cached layers by the method's rule.

    Source: METHOD.md section 2. The attention modules are numbered in execution order from 0, encoder first; cached
    are the middle block's and every decoder one whose number is even.

    Args:
        sites: All attention modules in execution order.

    Returns:
        Canonical names in execution order.
    """
    return tuple(
        site.name
        for number, site in enumerate(sites)
        if site.part == "middle" or (site.part == "decoder" and number % 2 == 0)
    )


@dataclass(frozen=True)
class Layout:
    """What adapters, references and U-Nets must share to work together.

    Attributes:
        context_width: Channels of the text states.
        channels: Width of each cached layer by canonical name, in execution order.
    """

    context_width: int
    channels: Mapping[str, int]

    def __post_init__(self) -> None:
        """Refuse a width that no model has.

        Raises:
            InputError: It is below 1.
        """
        check_range("context_width", self.context_width, 1)

    @property
    def family(self) -> str:
        """Model family, see ``family_of``."""
        return family_of(self.context_width)

    @property
    def layers(self) -> tuple[str, ...]:
        """Canonical layer names in execution order."""
        return tuple(self.channels)

    def describe(self) -> str:
        """Name the family for messages; one without a name by its text width."""
        other = f"a custom model (text width {self.context_width})"
        return FAMILY_NAMES.get(self.family, other)


def require_same_layout(first: Layout, first_name: str, second: Layout, second_name: str) -> None:
    """Refuse two things that were made for different models.

    Args:
        first: Layout of the one thing.
        first_name: What it is, with its verb: ``"The reference was encoded with"``.
        second: Layout of the other.
        second_name: What that is: ``"the adapters are for"``.

    Raises:
        MismatchError: Context width, layer list or a width differs; the message names both families, the debug log both layer lists.
    """
    same_widths = dict(first.channels) == dict(second.channels)
    if first.context_width == second.context_width and same_widths:
        return
    logger.debug("%s %s; %s %s", first_name, first.channels, second_name, second.channels)
    structure = " too, but of another structure" if first.family == second.family else ""
    raise MismatchError(
        f"{first_name} {first.describe()}, {second_name} {second.describe()}{structure}. Use adapters for this model (where "
        "there is no file: 'from this model' in ComfyUI, 'dreamcache fit'), and encode the reference with this model for these "
        "adapters (Encode Reference's input adapters; in Python encode_reference(image, adapters=adapters))."
    )
