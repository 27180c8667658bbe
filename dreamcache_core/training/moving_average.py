"""A moving average of the adapters, or none: diffusers' own, with its weights in a safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

FILE = "moving_average.safetensors"


class MovingAverage:
    """The average, and nothing at all where none is wanted.

    Args:
        parameters: Called for the parameters that are averaged, always the same in the same order.
        average: diffusers' ``EMAModel`` of them, or ``None``.
    """

    def __init__(
        self, parameters: Callable[[], Iterable[nn.Parameter]], average: Any | None
    ) -> None:
        self._parameters, self._average = parameters, average

    @classmethod
    def of(
        cls, parameters: Callable[[], Iterable[nn.Parameter]], decay: float | None
    ) -> MovingAverage:
        """Begin an average at the parameters' present values; ``None``: there is none."""
        if decay is None:
            return cls(parameters, None)
        from diffusers.training_utils import EMAModel

        return cls(parameters, EMAModel(list(parameters()), decay=decay))

    def step(self) -> None:
        """Take in the parameters after an optimizer step."""
        if self._average is not None:
            self._average.step(self._parameters())

    def copy_to(self, module: nn.Module) -> None:
        """Replace the weights of a module by the average."""
        if self._average is not None:
            self._average.copy_to(module.parameters())

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        if self._average is not None:
            shadows = self._average.shadow_params
            weights = {str(i): weight.cpu() for i, weight in enumerate(shadows)}
            (folder / FILE).write_bytes(save(weights))

    def load(self, folder: Path, step: int) -> None:
        """Take the average up again from a checkpoint.

        Args:
            folder: The checkpoint.
            step: Steps that the average had taken in.
        """
        if self._average is None:
            return
        weights = load_file(folder / FILE)
        for i, shadow in enumerate(self._average.shadow_params):
            shadow.copy_(weights[str(i)])
        self._average.optimization_step = step
