"""Optimizers by name: those of torch, and those of bitsandbytes where it is installed."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import InputError, MissingPackageError

NOT_FOR_ADAPTERS = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
"""A base class, and optimizers that want closures, sparse gradients or matrices alone."""


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make an optimizer.

    Args:
        name: A class of ``torch.optim`` (``AdamW``), or of ``bitsandbytes.optim`` (``AdamW8bit``).
        parameters: What it changes.
        learning_rate: Its learning rate.
        weight_decay: Its weight decay.

    Returns:
        The optimizer; other settings are its own defaults.

    Raises:
        InputError: There is no such optimizer, or it has no weight decay but one is wanted.
        MissingPackageError: It is not torch's, and bitsandbytes is not installed.
    """
    kind = _find(name)
    options: dict[str, Any] = {"lr": learning_rate}
    if "weight_decay" in inspect.signature(kind).parameters:
        options["weight_decay"] = weight_decay
    elif weight_decay:
        raise InputError(f"{name} has no weight decay. Set weight_decay = 0.")
    return kind(parameters, **options)


def _find(name: str) -> Any:
    known = torch_optimizers()
    if name in known:
        return known[name]
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(
            f"torch has no optimizer {name!r} (it has {', '.join(known)}), and bitsandbytes, which may, is not "
            "installed. Install it: pip install bitsandbytes."
        ) from error
    kind = getattr(bitsandbytes.optim, name, None)
    if kind is None:
        raise InputError(
            f"Neither torch nor bitsandbytes has an optimizer {name!r}. torch has {', '.join(known)}."
        )
    return kind


def torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Return the optimizers of torch that adapters can be trained with, by name."""
    return {
        name: kind
        for name, kind in sorted(vars(torch.optim).items())
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and name not in NOT_FOR_ADAPTERS
    }
