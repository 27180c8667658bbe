"""What a back end tells the core about one kind of U-Net."""

from typing import Any, Protocol

from torch import Tensor, nn

from ..layers import AttentionSite


class Backend(Protocol):
    """Names the attention modules of one kind of U-Net and knows how to call it."""

    def accepts(self, unet: nn.Module) -> bool:
        """Whether the module looks like this kind of U-Net."""
        ...

    def attention_sites(self, unet: nn.Module) -> tuple[AttentionSite, ...]:
        """List all attention modules in execution order, encoder first."""
        ...

    def call(
        self, unet: nn.Module, latent: Tensor, timestep: Tensor, text_states: Tensor, **kwargs: Any
    ) -> Tensor:
        """Run one forward pass.

        Args:
            unet: The U-Net.
            latent: Noised latent as the U-Net takes it, (batch, 4, height, width).
            timestep: Training index of each row, (batch,).
            text_states: (batch, tokens, context width).
            kwargs: Further arguments, passed on as given.

        Returns:
            The prediction, same shape as ``latent``.
        """
        ...


def is_attention_module(module: nn.Module) -> bool:
    """Whether a module is a SpatialTransformer or Transformer2DModel, by what it holds."""
    return hasattr(module, "transformer_blocks") and hasattr(module, "proj_in")
