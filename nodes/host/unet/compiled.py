"""References in a U-Net that a node has compiled: in graphs of their own, as those without are guarded too little."""

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from torch import Tensor, nn

from ....dreamcache_core.method.compiling import uncompiled

logger = logging.getLogger(__name__)

MOST_GRAPHS = 64
"""Kinds of calls (references, rows, sizes) that are compiled in one session; torch's own limit is 8."""


class OneGraph(nn.Module):
    """A U-Net compiled as one graph, with all guards.

    TorchCompileModel drops the guards on ``transformer_options``, so that its graphs, made without our patches, would be
    taken for calls with them. ``torch.compile`` keeps graphs by the code that it was given: this class has code of its
    own, and without breaks no other code is involved.

    Args:
        unet: The U-Net, not compiled.
        settings: What ComfyUI passed to ``torch.compile``.
    """

    def __init__(self, unet: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        self.unet = unet
        options = dict(settings["options"] or {})
        options.pop("guard_filter_fn", None)
        settings = {**settings, "options": options or None, "fullgraph": True}
        self.compiled = torch.compile(_call, **settings)

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the weights, which ComfyUI reads off the U-Net."""
        return self.unet.dtype  # pyright: ignore[reportReturnType]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the U-Net."""
        with torch._dynamo.config.patch(cache_size_limit=MOST_GRAPHS):
            return self.compiled(self.unet, *args, **kwargs)


def _call(unet: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return unet(*args, **kwargs)


_graphs: "WeakKeyDictionary[nn.Module, OneGraph | None]" = WeakKeyDictionary()


def compile_settings(base_model: Any) -> dict[str, Any] | None:
    """What a node has asked ``torch.compile`` for, for the MODEL that is sampled; ``None``: it is not compiled."""
    return base_model.current_patcher.model_options.get(TORCH_COMPILE_KWARGS)


def call_compiled(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a U-Net with references in it, compiled where it is compiled as a whole and without breaks, else as written.

    To be the last of the ``APPLY_MODEL`` wrappers: that of the compiling node has put in what it compiled by then.
    """
    base_model = executor.class_obj
    unet, settings = base_model.diffusion_model, compile_settings(base_model)
    if settings and unet not in _graphs and hasattr(unet, "_orig_mod"):
        _graphs[unet] = OneGraph(unet._orig_mod, settings)
    if graph := _graphs.get(unet):
        base_model.diffusion_model = graph
        try:
            return executor(*args, **kwargs)
        except _refusals() as error:
            _graphs[unet] = None
            logger.warning(
                "Steps in which a reference acts run uncompiled: torch.compile cannot make one graph of them. %s",
                str(error).partition("\n")[0],
            )
        finally:
            base_model.diffusion_model = unet
    with uncompiled:
        return executor(*args, **kwargs)


def _refusals() -> tuple[type[Exception], ...]:
    """What the compiler raises where it cannot go on; loaded with the compiler only."""
    from torch._dynamo import exc

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit
