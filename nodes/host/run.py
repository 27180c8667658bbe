"""What one sampling run keeps: a store, and in it the step that is under way."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from comfy.conds import CONDNoiseShape
from torch import Tensor

from ...dreamcache_core import Guidance
from ...dreamcache_core.method.blending import LayerReference, pool_area
from .applied import Applied

REGION = "dreamcache_region_"


class SigmaRange:
    """Noise levels from one (inclusive) down to another (exclusive).

    Args:
        sampling: A ``model_sampling``.
        start_percent: Progress at which the range starts, 0 to 1.
        end_percent: Progress at which it ends.
    """

    def __init__(self, sampling: Any, start_percent: float, end_percent: float) -> None:
        self.is_whole_run = start_percent <= 0 and end_percent >= 1
        if not self.is_whole_run:  # percent_to_sigma reads from the device
            self.start = _float32(sampling.percent_to_sigma(start_percent))
            self.end = _float32(sampling.percent_to_sigma(end_percent))

    def __contains__(self, sigma: float) -> bool:
        """Whether a noise level is in it."""
        return self.is_whole_run or self.end < sigma <= self.start


@dataclass(eq=False)
class Step:
    """One step of a run: what all its predictions share.

    Attributes:
        active: Indices of the uses that act at its noise level.
        guidance: How its predictions are combined.
        unconditional: Texts of the prediction without references; ``None``: the negative's.
        is_unfolded: Whether a call asked for predictions that image guidance cannot act on.
        offsets: How far image guidance has moved the negative's prediction, for each call.
        num_nested: Further predictions that other nodes have asked for.
    """

    active: tuple[int, ...]
    guidance: Guidance
    unconditional: list[dict[str, Any]] | None = None
    is_unfolded: bool = False
    offsets: list[Tensor] = field(default_factory=list[Tensor])
    num_nested: int = 0

    @property
    def needs_unconditional(self) -> bool:
        """Whether the prediction without references takes part as a third term."""
        return bool(self.active) and self.guidance.needs_unconditional

    def shift_nested(self, prediction: Tensor) -> Tensor:
        """Bring a further prediction of this step to where ``fold_guidance`` has put the step's own.

        Other nodes (PAG, SAG) take the difference of the two, which must not see the fold.

        Args:
            prediction: With the reference, of the size of the step's own.
        """
        if not self.offsets:
            return prediction
        offset = self.offsets[self.num_nested % len(self.offsets)]
        self.num_nested += 1
        return prediction + offset if offset.shape == prediction.shape else prediction


class RunStore:
    """What one sampling run computes once and needs at every step; emptied when the run ends.

    Args:
        applied: The references of the run.
        sampling: The ``model_sampling`` of the MODEL that samples.
        guidance: A guider's own; ``None``: that of the references.
    """

    def __init__(self, applied: Applied, sampling: Any, guidance: Guidance | None = None) -> None:
        self.applied = applied
        self.guidance = guidance or applied.guidance
        self.ranges = [SigmaRange(sampling, u.start_percent, u.end_percent) for u in applied.uses]
        self.image_range = SigmaRange(sampling, *self.guidance.image_range)
        self.step: Step | None = None
        self.prepared: dict[tuple[Any, ...], dict[str, LayerReference]] = {}
        self.rows: dict[tuple[Any, ...], Tensor] = {}
        self.regions: dict[tuple[Any, ...], Tensor] = {}
        self.has_warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunStore":
        """Return the same store: ComfyUI copies options at every step."""
        return self

    @contextmanager
    def new_step(self, timestep: Tensor) -> Iterator[Step]:
        """Begin a step; all calls inside the context belong to it.

        Args:
            timestep: Sigma of each row, (rows,), all equal; read back only where a range needs it.
        """
        outer, self.step = self.step, self._step_at(timestep)
        try:
            yield self.step
        finally:
            self.step = outer

    def step_at(self, timestep: Tensor) -> AbstractContextManager[Step]:
        """The step under way; a new one where another node calls ComfyUI's functions outside of any."""
        return nullcontext(self.step) if self.step else self.new_step(timestep)

    def _step_at(self, timestep: Tensor) -> Step:
        uses, ranges = self.applied.uses, (*self.ranges, self.image_range)
        if not uses or all(sigmas.is_whole_run for sigmas in ranges):
            return Step(tuple(range(len(uses))), self.guidance)
        sigma = float(timestep.flatten()[0])
        active = tuple(i for i, sigmas in enumerate(self.ranges) if sigma in sigmas)
        return Step(active, self.guidance.step(sigma in self.image_range))

    def row_index(self, is_on: tuple[bool, ...], device: torch.device) -> Tensor | None:
        """Indices of the rows that are on, int64; ``None`` where all are."""
        if all(is_on):
            return None
        if (is_on, device) not in self.rows:
            self.rows[is_on, device] = torch.tensor(is_on).nonzero().flatten().to(device)
        return self.rows[is_on, device]

    def region_conds(self, active: tuple[int, ...], x: Tensor) -> dict[str, CONDNoiseShape]:
        """Region masks of the active uses at the size of a latent, as ComfyUI crops and batches latents themselves.

        Args:
            active: Indices of the uses.
            x: The latents, (images, channels, height, width).
        """
        conds: dict[str, CONDNoiseShape] = {}
        for index in active:
            region = self.applied.uses[index].use.regions
            if region is None:
                continue
            key = (index, x.shape[0], x.shape[2:], x.device)
            if key not in self.regions:
                resized = pool_area(region.to(x.device), (x.shape[2], x.shape[3]))
                self.regions[key] = resized[:, None].expand(x.shape[0], -1, -1, -1)
            conds[f"{REGION}{index}"] = CONDNoiseShape(self.regions[key])
        return conds

    def clear(self) -> None:
        """Forget everything: copies of the run's options may live on."""
        for kept in (self.prepared, self.rows, self.regions):
            kept.clear()


def _float32(value: float) -> float:
    # sigmas arrive as float32: a bound that was rounded elsewhere would be off by one step
    return float(np.float32(value))
