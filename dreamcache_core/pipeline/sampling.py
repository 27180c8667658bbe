"""Which rows a step's U-Net call has: every needed prediction for every image, with its text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.guidance import Prediction


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts: text states (rows, tokens, width) and, for SDXL, the pooled vectors (rows, width)."""

    states: Tensor
    pooled: Tensor | None

    def repeat_each(self, times: int) -> "Text":
        """Repeat every row so many times, one after the other."""
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(times, dim=0)
        return Text(self.states.repeat_interleave(times, dim=0), pooled)

    def rows_from(self, first: int) -> "Text":
        """Leave out the rows before one."""
        pooled = None if self.pooled is None else self.pooled[first:]
        return Text(self.states[first:], pooled)

    @staticmethod
    def join(texts: Sequence["Text"]) -> "Text":
        """Put the rows of several one below the other."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return Text(
            torch.cat([text.states for text in texts]), torch.cat(pooled) if pooled else None
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """One step's U-Net rows: every needed prediction for every image, prediction by prediction."""

    predictions: tuple[Prediction, ...]
    text: Text
    num_images: int

    def last(self, count: int) -> "Rows":
        """Keep the last predictions only."""
        first_row = (len(self.predictions) - count) * self.num_images
        return Rows(self.predictions[-count:], self.text.rows_from(first_row), self.num_images)

    @property
    def see_references(self) -> list[bool]:
        """Which rows see the references."""
        return [p != "unconditional" for p in self.predictions for _ in range(self.num_images)]
