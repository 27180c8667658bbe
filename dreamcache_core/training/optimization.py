"""What changes the weights: optimizers by name, and a moving average of the result."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..errors import InputError, MissingPackageError

NOT_FOR_ADAPTERS = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
"""A base class, and optimizers that want closures, sparse gradients or matrices alone."""

AVERAGE_FILE = "moving_average.safetensors"
"""Of a checkpoint."""


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make an optimizer, its other settings at its own defaults.

    Args:
        name: A class of ``torch.optim`` (``AdamW``), or of ``bitsandbytes.optim`` (``AdamW8bit``).
        parameters: What it changes.
        learning_rate: Its learning rate.
        weight_decay: Its weight decay.

    Raises:
        InputError: There is no such optimizer, or it has no weight decay but one is wanted.
        MissingPackageError: It is not torch's, and bitsandbytes is not installed.
    """
    kind = _find_optimizer(name)
    options = {"lr": learning_rate}
    if "weight_decay" in inspect.signature(kind).parameters:
        options["weight_decay"] = weight_decay
    elif weight_decay:
        raise InputError(f"{name} has no weight decay. Set weight_decay = 0.")
    return kind(parameters, **options)


def _find_optimizer(name: str) -> Any:
    known = {
        name: kind
        for name, kind in sorted(vars(torch.optim).items())
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and name not in NOT_FOR_ADAPTERS
    }
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


class MovingAverage:
    """diffusers' moving average of weights, kept in safetensors files; nothing at all where none is wanted.

    Args:
        parameters: What is averaged, from its present values on.
        decay: Weight of the old average, 0 to 1; ``None``: no average.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float | None) -> None:
        self._parameters, self._average = list(parameters), None
        if decay is not None:
            from diffusers.training_utils import EMAModel

            self._average = EMAModel(self._parameters, decay=decay)

    def step(self) -> None:
        """Take in the parameters after an optimizer step."""
        if self._average is not None:
            self._average.step(self._parameters)

    def copy_to(self, module: nn.Module) -> None:
        """Replace the weights of a module by the average."""
        if self._average is not None:
            self._average.copy_to(module.parameters())

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        if self._average is not None:
            weights = {str(i): w.cpu() for i, w in enumerate(self._average.shadow_params)}
            (folder / AVERAGE_FILE).write_bytes(save(weights))

    def load(self, folder: Path, step: int) -> None:
        """Take up the average of ``step`` steps from a checkpoint."""
        if self._average is not None:
            weights = load_file(folder / AVERAGE_FILE)
            for i, shadow in enumerate(self._average.shadow_params):
                shadow.copy_(weights[str(i)])
            self._average.optimization_step = step
