"""What one sampling run keeps: a store, and in it the step that is under way."""

import logging
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

logger = logging.getLogger(__name__)

REGION = "dreamcache_region_"

Place = tuple[tuple[int, tuple[int, ...]], ...]
"""Where a call's latents lie in those of its step: the axes that are cut, each with what is left of it; empty: all of them."""

PART_UNKNOWN = (
    "Another node runs the model on latents of another size than those that are sampled and does not say which part of the "
    "image they are: the whole mask of Apply DreamCache is laid over them. For tiles or crops, take the mask off or leave that "
    "node out."
)
SHIFT_UNKNOWN = (
    "Another node compares the image's prediction with one for other latents and does not say which part of the image they "
    "are: image_guidance is missing in the latter, and the result is off. Set image_guidance to 1 or leave that node out."
)


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
        x: Its latents, (images, channels, height, width).
        active: Indices of the uses that act at its noise level.
        guidance: How its predictions are combined.
        positive: Texts of the guider's prompt; ``None``: unknown.
        negative: Negative texts of the guider, for calls that come without; ``None``: it has none.
        unconditional: Texts of the prediction without references; ``None``: the negative's.
        offsets: How far image guidance has moved the negative's prediction, by the place of the latents.
    """

    x: Tensor
    active: tuple[int, ...]
    guidance: Guidance
    positive: list[dict[str, Any]] | None = None
    negative: list[dict[str, Any]] | None = None
    unconditional: list[dict[str, Any]] | None = None
    offsets: dict[Place | None, Tensor] = field(default_factory=dict[Place | None, Tensor])

    @property
    def needs_unconditional(self) -> bool:
        """Whether the prediction without references takes part as a third term."""
        return bool(self.active) and self.guidance.needs_unconditional

    def place_of(self, x: Tensor, window: Any) -> Place | None:
        """Tell where latents lie in those of the step.

        Args:
            x: The latents, (images, channels, height, width).
            window: ComfyUI's context window, or ``None``. One may be left over from another call.

        Returns:
            By ComfyUI's word, by the size or by the values; ``None`` where nothing tells.
        """
        if window is not None:
            anchor = getattr(window, "causal_anchor_index", None)
            indices = (*(() if anchor is None else (anchor,)), *window.index_list)
            size = list(self.x.shape)
            if max(indices) < size[window.dim]:
                size[window.dim] = len(indices)
                if x.shape == tuple(size):
                    return ((window.dim, indices),)
        return () if x.shape == self.x.shape else _find(x, self.x)


class RunStore:
    """What one sampling run computes once and needs at every step; emptied when the run ends.

    Args:
        applied: The references of the run.
        sampling: The ``model_sampling`` of the MODEL that samples.
        guidance: A guider's own; ``None``: that of the references.

    Attributes:
        needs_unconditional: Whether a step has needed the prediction without references.
        has_unconditional: Whether a step has had it.
        asks_separately: Whether it is asked for in a call of its own.
        has_pairs: Whether a text was asked for with its negative.
        has_others: Whether a text besides the prompt was asked for otherwise, so that nothing tells whether it is a negative.
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
        self.warnings: set[str] = set()
        self.needs_unconditional = False
        self.has_unconditional = False
        self.asks_separately = False
        self.has_pairs = False
        self.has_others = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunStore":
        """Return the same store: ComfyUI copies options at every step."""
        return self

    @contextmanager
    def new_step(self, timestep: Tensor, x: Tensor) -> Iterator[Step]:
        """Begin a step; all calls inside the context belong to it.

        Args:
            timestep: Sigma of each row, (rows,), all equal; read back only where a range needs it.
            x: Its latents, (images, channels, height, width).
        """
        outer, self.step = self.step, self._step_at(timestep, x)
        try:
            yield self.step
        finally:
            self.step = outer

    def step_at(self, timestep: Tensor, x: Tensor) -> AbstractContextManager[Step]:
        """The step under way; a new one where another node calls ComfyUI's functions outside of any."""
        return nullcontext(self.step) if self.step else self.new_step(timestep, x)

    def _step_at(self, timestep: Tensor, x: Tensor) -> Step:
        uses, ranges = self.applied.uses, (*self.ranges, self.image_range)
        if not uses or all(sigmas.is_whole_run for sigmas in ranges):
            step = Step(x, tuple(range(len(uses))), self.guidance)
        else:
            sigma = float(timestep.flatten()[0])
            active = tuple(i for i, sigmas in enumerate(self.ranges) if sigma in sigmas)
            step = Step(x, active, self.guidance.step(sigma in self.image_range))
        self.needs_unconditional |= step.needs_unconditional
        return step

    def take_note(self, step: Step, conds: list[Any]) -> None:
        """Remember in which lists of texts the predictions of a step are asked for."""
        if len(conds) == 2:
            self.has_pairs = True
        elif any(cond is not None and cond is not step.positive for cond in conds):
            self.has_others = True

    @property
    def lacks_joint(self) -> bool:
        """Whether joint guidance was wanted, and no negative known to leave the reference out of."""
        return self.guidance.mode == "joint" and self.has_others and not self.has_pairs

    def row_index(self, is_on: tuple[bool, ...], device: torch.device) -> Tensor | None:
        """Indices of the rows that are on, int64; ``None`` where all are."""
        if all(is_on):
            return None
        if (is_on, device) not in self.rows:
            self.rows[is_on, device] = torch.tensor(is_on).nonzero().flatten().to(device)
        return self.rows[is_on, device]

    def region_conds(self, step: Step, x: Tensor, place: Place | None) -> dict[str, CONDNoiseShape]:
        """Region masks of the active uses at the size of a latent, as ComfyUI crops and batches latents themselves.

        Args:
            step: The step.
            x: The latents, (images, channels, height, width).
            place: Where they lie in the step's; ``None``: nobody knows, and the masks are taken for theirs.
        """
        height, width = (x if place is None else step.x).shape[-2:]
        conds: dict[str, CONDNoiseShape] = {}
        for index in step.active:
            region = self.applied.uses[index].use.regions
            if region is None:
                continue
            if place is None:
                self.warn_once(PART_UNKNOWN)
            key = (index, height, width, x.device)
            if key not in self.regions:
                self.regions[key] = pool_area(region.to(x.device), (height, width))[:, None]
            conds[f"{REGION}{index}"] = CONDNoiseShape(cut(self.regions[key], place or ()))
        return conds

    def shift_nested(self, step: Step, prediction: Tensor, place: Place | None) -> Tensor:
        """Bring a further prediction of a step to where ``fold_guidance`` has put the step's own.

        Other nodes (PAG, SAG) take the difference of the two, which must not see the fold.

        Args:
            step: The step.
            prediction: With the reference.
            place: Where it lies in the step's latents.
        """
        if not step.offsets:
            return prediction
        if place is not None:
            if place in step.offsets:
                return prediction + step.offsets[place]
            if () in step.offsets:
                return prediction + cut(step.offsets[()], place)
        self.warn_once(SHIFT_UNKNOWN)
        return prediction

    def warn_once(self, message: str) -> None:
        """Log a warning, once in a run."""
        if message not in self.warnings:
            self.warnings.add(message)
            logger.warning(message)

    def clear(self) -> None:
        """Forget everything: copies of the run's options may live on."""
        for kept in (self.prepared, self.rows, self.regions):
            kept.clear()


def cut(whole: Tensor, place: Place) -> Tensor:
    """Take the part at a place out of what has the size of a step's latents, or one entry for all its images."""
    for axis, indices in place:
        if whole.shape[axis] > 1:
            whole = whole.index_select(axis, torch.tensor(indices, device=whole.device))
    return whole


def _find(x: Tensor, whole: Tensor) -> Place | None:
    # latents are noise: a crop of them is found by its values; one channel of four is enough
    crops, latents = x[:, 0], whole[:, 0]
    height, width = crops.shape[1:]
    if height > latents.shape[1] or width > latents.shape[2]:
        return None
    corners = latents[:, : latents.shape[1] - height + 1, : latents.shape[2] - width + 1]
    for _, top, left in (corners == crops[0, 0, 0]).nonzero().tolist():
        rows, columns = range(top, top + height), range(left, left + width)
        candidates = latents[:, top : top + height, left : left + width]
        is_same = (crops[:, None] == candidates).flatten(2).all(dim=2)  # -> (crops, images)
        if is_same.any(dim=1).all():
            images = is_same.int().argmax(dim=1).tolist()
            return ((0, tuple(images)), (2, tuple(rows)), (3, tuple(columns)))
    return None


def _float32(value: float) -> float:
    # sigmas arrive as float32: a bound that was rounded elsewhere would be off by one step
    return float(np.float32(value))
