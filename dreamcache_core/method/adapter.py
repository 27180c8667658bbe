"""The trained modules: one adapter per cached layer, and the set of them. Knows tensors only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_range
from .layers import Layout


class Attention(Protocol):
    """Multi-head attention over (batch, tokens, channels) tensors; ComfyUI's ``optimized_attention`` fits."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: (batch, tokens, channels).
            key: (batch, reference_tokens, channels).
            value: (batch, reference_tokens, channels).
            heads: Number of heads; divides channels.
            mask: Added to the logits, (batch, 1, 1, reference_tokens), or ``None``.

        Returns:
            (batch, tokens, channels).
        """
        ...


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """Attend with PyTorch's fused kernel; see ``Attention`` for the arguments."""
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    # -> (batch, heads, tokens, head_dim)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)  # -> (batch, tokens, channels)


class LayerAdapter(nn.Module, ABC):
    """What the trained and the fused form of one layer's adapter share: attention to the reference."""

    norm: nn.Module
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module

    def project_reference(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what depends on the reference alone, once per reference.

        Source: METHOD.md section 4, "Two facts that follow".

        Args:
            reference: Cached features as tokens, un-normalised, (batch, reference_tokens, channels).

        Returns:
            Key and value, each (batch, reference_tokens, channels).
        """
        return self.to_k(reference), self.to_v(reference)

    def attend(
        self,
        hidden_states: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: int,
        attention: Attention = torch_attention,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Let the image's tokens look at the reference's, before the output projection.

        Source: METHOD.md section 4, ``attn_mem`` without ``to_out``.

        Args:
            hidden_states: Hidden states entering the block, (batch, tokens, channels).
            key: From ``project_reference``, (1 or batch, reference_tokens, channels).
            value: Likewise.
            heads: Number of heads of the block's self-attention.
            attention: The attention kernel.
            key_mask: Added to the logits, (batch, 1, 1, reference_tokens), or ``None``.

        Returns:
            (batch, tokens, channels).
        """
        query = self.to_q(self.norm(hidden_states))
        rows = query.shape[0]
        key, value = key.expand(rows, -1, -1), value.expand(rows, -1, -1)
        if key_mask is None:
            return attention(query, key, value, heads)
        return attention(query, key, value, heads, mask=key_mask)

    @abstractmethod
    def merge_attention(self, self_attention: Tensor, attended: Tensor) -> Tensor:
        """Join the base model's self-attention output with what was read from the reference."""

    def forward(
        self,
        hidden_states: Tensor,
        self_attention: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> Tensor:
        """Compute what replaces the self-attention output: ``linear_cat(concat([self, ref]))``.

        Source: METHOD.md section 4.

        Args:
            hidden_states: See ``attend``.
            self_attention: Output of the block's self-attention, (batch, tokens, channels).
            key: See ``attend``.
            value: See ``attend``.
            options: See ``attend``.

        Returns:
            (batch, tokens, channels); the caller adds it to the residual.
        """
        return self.merge_attention(
            self_attention, self.attend(hidden_states, key, value, **options)
        )


class ReferenceAdapter(LayerAdapter):
    """The adapter of one layer as it is trained: 6 d^2 + 4 d parameters (METHOD.md section 4).

    Args:
        channels: Width d of the layer's hidden states.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.norm = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.merge = nn.Linear(2 * channels, channels)

    def merge_attention(self, self_attention: Tensor, attended: Tensor) -> Tensor:
        """Project the attended values and merge, both (batch, tokens, channels)."""
        return self.merge(torch.cat([self_attention, self.to_out(attended)], dim=-1))


class FusedAdapter(LayerAdapter):
    """The adapter of one layer as it generates: 5 d^2 + 3 d parameters.

    ``merge`` splits into ``W_self | W_ref``, and ``W_ref . to_out`` is one matrix (METHOD.md section 4).

    Args:
        weights: Its weights by name; copied.
        operations: Namespace with ``Linear`` and ``LayerNorm`` (``torch.nn``, ``comfy.ops.manual_cast``).
        dtype: Storage type.
    """

    def __init__(self, weights: Mapping[str, Tensor], operations: Any, dtype: torch.dtype) -> None:
        super().__init__()
        channels = len(weights["to_q.weight"])
        common: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
        self.norm = operations.LayerNorm(channels, **common)
        self.to_q = operations.Linear(channels, channels, bias=False, **common)
        self.to_k = operations.Linear(channels, channels, bias=False, **common)
        self.to_v = operations.Linear(channels, channels, bias=False, **common)
        self.merge_self = operations.Linear(channels, channels, bias=False, **common)
        self.merge_ref = operations.Linear(channels, channels, bias=True, **common)
        # ComfyUI's layers may take over the float type of what they load
        self.load_state_dict({name: value.to(dtype) for name, value in weights.items()})
        self.requires_grad_(False)

    def merge_attention(self, self_attention: Tensor, attended: Tensor) -> Tensor:
        """Merge with the folded matrices, both (batch, tokens, channels)."""
        return self.merge_self(self_attention) + self.merge_ref(attended)


@torch.no_grad()
def fused_weights(adapter: ReferenceAdapter) -> dict[str, Tensor]:
    """Fold the matrices that can be multiplied beforehand (METHOD.md section 4).

    Args:
        adapter: The trained adapter of one layer; left as it is.

    Returns:
        Weights of a ``FusedAdapter`` by name, on the CPU; the products are float32.
    """
    trained = {name: value.cpu() for name, value in adapter.state_dict().items()}
    w_self, w_ref = trained.pop("merge.weight").float().chunk(2, dim=1)
    merge_bias = trained.pop("merge.bias").float()
    out_weight, out_bias = (trained.pop(f"to_out.{name}").float() for name in ("weight", "bias"))
    return {
        **trained,
        "merge_self.weight": w_self,
        "merge_ref.weight": w_ref @ out_weight,
        "merge_ref.bias": w_ref @ out_bias + merge_bias,
    }


@dataclass(frozen=True)
class AdapterInfo:
    """Where adapters come from and what they were trained for.

    Attributes:
        layout: Family, context width and layer widths.
        timestep: Training index at which references are cached, 0 to 999.
        base_model: Name of the base model, for people.
        prediction: What the base model predicts, ``epsilon`` or ``v_prediction``.
        extra: Further entries of the file's metadata (training configuration, licence).
    """

    layout: Layout
    timestep: int = 1
    base_model: str = ""
    prediction: str = "epsilon"
    extra: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Refuse a timestep that no model has.

        Raises:
            InputError: It is out of range.
        """
        check_range("timestep", self.timestep, 0, 999)


class AdapterModules(nn.Module):
    """Adapters of several layers, by canonical layer name.

    Args:
        adapters: Adapter by canonical layer name, in execution order.
        info: Their origin.
    """

    def __init__(self, adapters: Mapping[str, LayerAdapter], info: AdapterInfo) -> None:
        super().__init__()
        self.info = info
        for layer, adapter in adapters.items():
            self.add_module(_module_name(layer), adapter)

    @property
    def layers(self) -> tuple[str, ...]:
        """Canonical names of the adapted layers, in execution order."""
        return self.info.layout.layers

    @property
    def family(self) -> str:
        """Model family that the adapters were trained for."""
        return self.info.layout.family

    def __getitem__(self, layer: str) -> LayerAdapter:
        """Return the adapter of a layer."""
        return self.get_submodule(_module_name(layer))  # pyright: ignore[reportReturnType]

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def __iter__(self) -> Iterator[str]:
        """Iterate over canonical layer names."""
        return iter(self.layers)

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def get_ram_usage(self) -> int:
        """Bytes in main memory, for the output cache of ComfyUI 0.8 (``--cache-ram``); newer ones count bare tensors only."""
        return self.nbytes


class FusedAdapterSet(AdapterModules):
    """Adapters ready to generate; made by ``AdapterSet.fuse``."""


class AdapterSet(AdapterModules):
    """Adapters as they are trained and stored.

    Args:
        info: Layout and origin; one freshly initialised adapter is made per layer.
    """

    def __init__(self, info: AdapterInfo) -> None:
        super().__init__(
            {layer: ReferenceAdapter(width) for layer, width in info.layout.channels.items()}, info
        )

    def fuse(self, operations: Any = nn, dtype: torch.dtype = torch.float32) -> FusedAdapterSet:
        """Fold the matrices of each layer that can be multiplied beforehand, see ``fused_weights``.

        Args:
            operations: Namespace with ``Linear`` and ``LayerNorm`` to build the layers from.
            dtype: Storage type of the fused weights.

        Returns:
            New modules on the CPU, without gradients; this set stays as it is.
        """
        fused = {
            layer: FusedAdapter(fused_weights(self[layer]), operations, dtype)  # pyright: ignore[reportArgumentType]
            for layer in self.layers
        }
        return FusedAdapterSet(fused, self.info)


def _module_name(layer: str) -> str:
    # module names may not contain dots
    return layer.replace(".", "-")
