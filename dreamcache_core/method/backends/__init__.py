"""The kinds of U-Net that the core works on."""

from collections.abc import Mapping, Sequence

from torch import nn

from ...errors import MismatchError, UnsupportedModelError
from ..layers import AttentionSite, Layout, default_layers, require_same_layout
from . import diffusers, ldm
from .base import Backend

__all__ = [
    "Backend",
    "attention_sites",
    "backend_for",
    "layout_of",
    "require_fit",
    "select_sites",
]

BACKENDS: tuple[Backend, ...] = (ldm, diffusers)


def backend_for(unet: nn.Module) -> Backend:
    """Find the back end of a U-Net.

    Args:
        unet: An ldm-style ``UNetModel`` or diffusers' ``UNet2DConditionModel``.

    Returns:
        Its back end.

    Raises:
        UnsupportedModelError: The model is not a U-Net of either kind (a DiT such as Flux, say).
    """
    for backend in BACKENDS:
        if backend.accepts(unet):
            return backend
    raise UnsupportedModelError(
        f"DreamCache works on U-Nets of Stable Diffusion 1.x, 2.x and SDXL; {type(unet).__name__} is another kind "
        "of model (Flux, SD 3 and other transformers have no U-Net decoder to read features from). "
        "Load a Stable Diffusion 1.x, 2.x or SDXL model."
    )


def attention_sites(unet: nn.Module) -> tuple[AttentionSite, ...]:
    """List all attention modules of a U-Net in execution order, encoder first.

    Raises:
        UnsupportedModelError: The model is not a supported U-Net, or has no attention to text.
    """
    sites = backend_for(unet).attention_sites(unet)
    if not sites:
        raise UnsupportedModelError(
            f"{type(unet).__name__} has no attention modules to read features from. "
            "Load a Stable Diffusion 1.x, 2.x or SDXL model."
        )
    return sites


def select_sites(
    unet: nn.Module, layers: Sequence[str] | None = None
) -> Mapping[str, AttentionSite]:
    """Pick the cached layers of a U-Net.

    Args:
        unet: The U-Net.
        layers: Canonical names, in any order; ``None`` takes METHOD.md's rule.

    Returns:
        Attention module by canonical name, in execution order.

    Raises:
        MismatchError: The U-Net has no layer of that name, or no layer is wanted; the message lists those that it has.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    sites = attention_sites(unet)
    wanted = default_layers(sites) if layers is None else tuple(layers)
    known = {site.name: site for site in sites}
    if not wanted:
        raise MismatchError(
            f"Expected at least one cached layer, given none. The U-Net has {', '.join(known)}. Name some of them."
        )
    missing = sorted(set(wanted) - set(known))
    if missing:
        raise MismatchError(
            f"The U-Net has no attention layer {', '.join(missing)}. It has {', '.join(known)}. "
            "Use adapters and references made for this model's structure."
        )
    return {site.name: site for site in sites if site.name in wanted}


def layout_of(
    unet: nn.Module, layers: Sequence[str] | None = None, context_width: int | None = None
) -> Layout:
    """Describe a U-Net by context width and the widths of its cached layers.

    Args:
        unet: The U-Net.
        layers: Canonical names; ``None`` takes METHOD.md's rule.
        context_width: Channels of its text states; ``None`` reads them off its attention to text.

    Returns:
        The layout that adapters and references for this U-Net have.

    Raises:
        MismatchError: The U-Net has no layer of that name.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    sites = select_sites(unet, layers)
    width = context_width or next(iter(sites.values())).context_width
    return Layout(width, {name: site.channels for name, site in sites.items()})


def require_fit(
    unet: nn.Module, layout: Layout, name: str, context_width: int | None = None
) -> None:
    """Refuse a U-Net that adapters or a reference were not made for.

    Args:
        unet: The U-Net.
        layout: What the other was made for.
        name: What the other is, with its verb, for the message: ``"the adapters are for"``.
        context_width: The U-Net's, see ``layout_of``.

    Raises:
        MismatchError: They differ in context width, layers or widths; the message names both families.
        UnsupportedModelError: The model is not a supported U-Net.
    """
    has_layers = set(layout.layers) <= {site.name for site in attention_sites(unet)}
    own = layout_of(unet, layout.layers if has_layers else None, context_width)
    require_same_layout(own, "This model is", layout, name)
