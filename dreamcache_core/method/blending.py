"""The mathematics of references inside a U-Net's block, shared by all hosts (METHOD.md section 4)."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError
from ..images.reference import check_mask
from .adapter import AdapterModules, Attention, LayerAdapter, torch_attention
from .cache import ReferenceCache
from .layers import require_same_layout
from .tokens import keep_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ReferenceUse:
    """One reference, put to use by one set of adapters.

    Attributes:
        reference: The cache. Its images are of one subject: every image sees the tokens of all of them.
        adapters: Adapters for the same model: fused to generate, unfused to train.
        scale: Strength, unitless: 0 is exactly the plain model, 1 as trained.
        mask: Region of the new image that the reference acts on, (height, width) or (images, height, width) in
            [0, 1], any size; ``None`` is everywhere.
        per_row: Of R references, reference r serves the batch rows r, r + R, r + 2R and so on, instead of all
            serving every row.
    """

    reference: ReferenceCache
    adapters: AdapterModules
    scale: float = 1.0
    mask: Tensor | None = None
    per_row: bool = False

    def __post_init__(self) -> None:
        """Check that the parts fit.

        Raises:
            InputError: The scale is no finite number, or the mask is misshapen or outside [0, 1].
            MismatchError: Reference and adapters were made for different models.
        """
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise InputError(f"scale must be a finite number; given {self.scale!r}.")
        if self.mask is not None:
            check_mask(self.mask)
        if not isinstance(self.reference, ReferenceCache) or not isinstance(
            self.adapters, AdapterModules
        ):
            raise InputError(
                f"Expected ReferenceUse(reference, adapters); given a {type(self.reference).__name__} and a "
                f"{type(self.adapters).__name__}."
            )
        info = self.adapters.info
        require_same_layout(
            self.reference.layout,
            "The reference was encoded with",
            info.layout,
            "the adapters are for",
        )
        if self.timestep_mismatch:
            logger.warning("%s", self.timestep_mismatch)

    @property
    def timestep_mismatch(self) -> str:
        """What is amiss where the reference was not encoded at the adapters' timestep, else empty."""
        encoded, trained = self.reference.timestep, self.adapters.info.timestep
        if encoded == trained:
            return ""
        return (
            f"The reference was encoded at timestep {encoded}, the adapters are for timestep {trained}: expect a weaker "
            "likeness. Encode it again for these adapters."
        )

    @cached_property
    def is_active(self) -> bool:
        """Whether it changes anything: a scale that is not 0 and a mask that is not empty."""
        return self.scale != 0 and (self.mask is None or bool(self.mask.any()))

    @cached_property
    def regions(self) -> Tensor | None:
        """The mask as (images, height, width) float32, or ``None`` for everywhere (a mask of ones is that too)."""
        if self.mask is None or bool((self.mask == 1).all()):
            return None
        return check_mask(self.mask)


@dataclass(frozen=True, eq=False)
class LayerReference:
    """One use at one layer, ready to attend to.

    Attributes:
        adapter: Adapter of the layer.
        dtype: Float type that the adapter computes in.
        key: (references, reference_tokens, channels); reference r serves the rows r, r + references and so on.
        value: Likewise.
        key_mask: Added to the logits, (references, 1, 1, reference_tokens), or ``None``.
        scale: Strength; for compiled code as float32 (1,), so that another number needs no other graph.
        region: Weight of the reference by place, (images, height, width); row r has that of image r % images.
            ``None``: 1 everywhere.
    """

    adapter: LayerAdapter
    dtype: torch.dtype
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    scale: float | Tensor
    region: Tensor | None


def prepare_layer(
    use: ReferenceUse,
    layer: str,
    adapter: LayerAdapter,
    *,
    device: torch.device,
    dtype: torch.dtype,
    is_compiled: bool = False,
) -> LayerReference:
    """Project a reference to keys and values at one layer.

    Source: METHOD.md section 4: the map flattened row-major, un-normalised; tokens of several images concatenated.
    With subject masks the background is reduced to a few tokens (``keep_tokens``).

    Args:
        use: The use.
        layer: Canonical layer name.
        adapter: The layer's adapter; ``use.adapters[layer]`` or its copy on another device.
        device: Where to compute.
        dtype: Float type to compute in.
        is_compiled: Whether code that ``torch.compile`` has made will read it.

    Returns:
        Keys and values, everything else as in ``use``.
    """
    features = use.reference.features[layer].to(device=device, dtype=dtype)
    # laid out alike with and without masks, as kernels may round by layout -> (references, tokens, channels)
    tokens = features.flatten(2).transpose(1, 2).contiguous()
    masks, key_mask = use.reference.masks, None
    if masks is not None:
        subjects = masks[layer].flatten(1).to(device)
        kept = [keep_tokens(*pair) for pair in zip(tokens, subjects, strict=True)]
        tokens = torch.cat(kept)[None]
        if use.per_row:
            tokens, key_mask = _pad(kept)
    elif not use.per_row:
        tokens = tokens.flatten(0, 1)[None]
    key, value = adapter.project_reference(tokens)
    region = None if use.regions is None else use.regions.to(device)
    scale = torch.tensor([float(use.scale)], device=device) if is_compiled else use.scale
    return LayerReference(adapter, dtype, key, value, key_mask, scale, region)


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths -> (rows, tokens, channels), and what hides the padding, (rows, 1, 1, tokens)."""
    tokens = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
    hidden = torch.zeros_like(is_padding, dtype=tokens.dtype).masked_fill(is_padding, -math.inf)
    return tokens, hidden[:, None, None]


def blend_references(
    hidden_states: Tensor,
    self_attention: Tensor,
    references: Sequence[LayerReference],
    *,
    heads: int,
    size: tuple[int, int],
    rows: Tensor | None = None,
    attention: Attention = torch_attention,
) -> Tensor:
    """Compute what a block adds to its hidden states in place of the self-attention output.

    Source: METHOD.md section 4, for several references DESIGN: ``self + sum_k scale_k * mask_k * (linear_cat([self,
    ref_k]) - self)``.

    Args:
        hidden_states: Hidden states entering the block, (batch, tokens, channels).
        self_attention: Output of its self-attention, same shape.
        references: The uses at this layer.
        heads: Number of heads of the self-attention.
        size: Height and width of the layer's feature map; region masks apply where their product is the number of
            tokens, and are left out where something else has changed the tokens.
        rows: Indices of the batch rows that see the references, int64; ``None``: all. Other rows come out as
            ``self_attention``, bit for bit.
        attention: The attention kernel.

    Returns:
        Same shape and dtype as ``self_attention``.
    """
    x, base = hidden_states, self_attention
    if rows is not None:
        x, base = x.index_select(0, rows), base.index_select(0, rows)
    blended = base
    for ref in references:
        key, value, key_mask = (
            _rows_of(tensor, rows, len(self_attention))
            for tensor in (ref.key, ref.value, ref.key_mask)
        )
        merged = ref.adapter(
            x.to(ref.dtype),
            base.to(ref.dtype),
            key,
            value,
            heads=heads,
            attention=attention,
            key_mask=key_mask,
        ).to(base.dtype)
        region = _region_weights(ref.region, size, self_attention, rows)
        # alone, everywhere and at scale 1 it is what was trained, to the bit
        is_alone = region is None and len(references) == 1
        if is_alone and not isinstance(ref.scale, Tensor) and ref.scale == 1:
            blended = merged
            continue
        weight = ref.scale if region is None else ref.scale * region
        blended = blended + (weight * (merged - base)).to(base.dtype)
        if is_alone and isinstance(ref.scale, Tensor):
            blended = torch.where(ref.scale == 1, merged, blended)
    if rows is None:
        return blended
    return self_attention.index_copy(0, rows, blended)


def pool_area(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Average the area under each new pixel, on any device.

    The same as ``interpolate(mode="area")``, which Apple's GPUs refuse where the sizes do not divide.

    Args:
        maps: (..., height, width).
        size: New height and width, at least 1.

    Returns:
        (..., new height, new width), float32; zeros and ones stay exact.
    """
    rows, columns = (
        _covered(old, new, maps.device) for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    areas = rows.sum(dim=1)[:, None] * columns.sum(dim=1)
    return rows @ maps.float() @ columns.T / areas


def _covered(old: int, new: int, device: torch.device) -> Tensor:
    """Which old pixels lie under each new one, wholly or partly: zeros and ones, (new, old)."""
    at, under = torch.arange(new, device=device)[:, None], torch.arange(old, device=device)
    # ceil of (at + 1) * old / new
    ends = ((at + 1) * old + new - 1) // new
    return ((at * old // new <= under) & (under < ends)).float()


def _rows_of(tensor: Any, rows: Tensor | None, num_rows: int) -> Any:
    """Give each row that sees a reference the one that serves it."""
    if tensor is None or tensor.shape[0] == 1 or (rows is None and tensor.shape[0] == num_rows):
        return tensor
    index = torch.arange(num_rows, device=tensor.device) if rows is None else rows
    return tensor.index_select(0, index % tensor.shape[0])


def _region_weights(
    region: Tensor | None, size: tuple[int, int], like: Tensor, rows: Tensor | None
) -> Tensor | None:
    """Weight of each token, (1 or rows, tokens, 1), or ``None`` for all ones."""
    if region is None or size[0] * size[1] != like.shape[1]:
        return None
    # not resize_mask: its checks would wait for the device in every block
    weights = pool_area(region, size).flatten(1)[..., None].to(like.dtype)  # -> (images, tokens, 1)
    return _rows_of(weights, rows, len(like))
