"""What is on a MODEL after Apply DreamCache, and what one sampling run keeps of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from comfy.conds import CONDNoiseShape
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...dreamcache_core import Guidance, ReferenceUse
from ...dreamcache_core.method.blending import LayerReference, pool_area

KEY = "dreamcache"
REGION = "dreamcache_region_"


@dataclass(frozen=True, eq=False)
class AppliedUse:
    """One Apply node's reference.

    Attributes:
        use: The reference with its adapters, scale and region.
        patcher: ModelPatcher of the adapters, as the Apply node made it.
        start_percent: Progress from which on it acts, 0 to 1, inclusive.
        end_percent: Progress up to which it acts, 0 to 1, exclusive.
    """

    use: ReferenceUse
    patcher: ModelPatcher
    start_percent: float
    end_percent: float

    @property
    def is_always_on(self) -> bool:
        """Whether the range covers every step, so that no sigma has to be read."""
        return self.start_percent <= 0 and self.end_percent >= 1


@dataclass(frozen=True, eq=False)
class Applied:
    """Everything that the Apply nodes up to here have put on a MODEL; immutable, shared by clones."""

    uses: tuple[AppliedUse, ...]
    guidance: Guidance

    @property
    def acting(self) -> "Applied":
        """The same without references that change nothing."""
        return replace(self, uses=tuple(u for u in self.uses if u.use.is_active))

    @property
    def patchers(self) -> list[ModelPatcher]:
        """The adapters' ModelPatchers, each once."""
        return list(dict.fromkeys(applied.patcher for applied in self.uses))


class SigmaRange:
    """Noise levels from one (inclusive) down to another (exclusive).

    Args:
        sampling: A ``model_sampling``.
        start_percent: Progress at which the range starts, 0 to 1.
        end_percent: Progress at which it ends.
    """

    def __init__(self, sampling: Any, start_percent: float, end_percent: float) -> None:
        self.start = _float32(sampling.percent_to_sigma(start_percent))
        self.end = _float32(sampling.percent_to_sigma(end_percent))

    def __contains__(self, sigma: float) -> bool:
        """Whether a noise level is in it."""
        return self.end < sigma <= self.start


class RunStore:
    """What one sampling run computes once and needs at every step; dropped when the run ends.

    Args:
        applied: The references of the run.
        sampling: The ``model_sampling`` of the MODEL that samples.
    """

    def __init__(self, applied: Applied, sampling: Any) -> None:
        self.uses = applied.uses
        self.sampling = sampling
        self.is_ranged = not all(use.is_always_on for use in applied.uses)
        self.ranges = [
            SigmaRange(sampling, use.start_percent, use.end_percent)
            for use in applied.uses
            if self.is_ranged
        ]
        self.guidance_ranges: dict[tuple[float, float], SigmaRange] = {}
        self.last_sigma: tuple[Tensor, float] | None = None
        self.prepared: dict[tuple[Any, ...], LayerReference] = {}
        self.rows: dict[tuple[Any, ...], Tensor] = {}
        self.regions: dict[tuple[Any, ...], Tensor] = {}
        self.offsets: list[Tensor] = []
        self.num_nested = 0
        self.is_unfolded = False
        self.has_warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunStore":
        """Return the same store: ComfyUI copies options at every step."""
        return self

    def active_at(self, timestep: Tensor) -> tuple[int, ...]:
        """Indices of the uses whose range holds a noise level; it is read back only where a range needs it.

        Args:
            timestep: Sigma of each row, (rows,), all equal.
        """
        if not self.is_ranged:
            return tuple(range(len(self.uses)))
        sigma = self.sigma_of(timestep)
        return tuple(i for i, sigmas in enumerate(self.ranges) if sigma in sigmas)

    def guidance_at(self, guidance: Guidance, timestep: Tensor) -> Guidance:
        """Guidance of one step, see ``Guidance.image_range``; the noise level is read back only where a range needs it."""
        if guidance.is_always_on:
            return guidance
        start_end = guidance.image_range
        # percent_to_sigma reads from the device: once a run
        if start_end not in self.guidance_ranges:
            self.guidance_ranges[start_end] = SigmaRange(self.sampling, *start_end)
        return guidance.step(self.sigma_of(timestep) in self.guidance_ranges[start_end])

    def sigma_of(self, timestep: Tensor) -> float:
        """Read a noise level back from the device, once however often it is asked for."""
        if self.last_sigma is None or self.last_sigma[0] is not timestep:
            self.last_sigma = timestep, float(timestep.flatten()[0])
        return self.last_sigma[1]

    def row_index(self, is_on: tuple[bool, ...], device: torch.device) -> Tensor | None:
        """Indices of the rows that are on, int64; ``None`` where all are."""
        if all(is_on):
            return None
        if (is_on, device) not in self.rows:
            self.rows[is_on, device] = torch.tensor(is_on).nonzero().flatten().to(device)
        return self.rows[is_on, device]

    def region_conds(self, active: Sequence[int], x: Tensor) -> dict[str, CONDNoiseShape]:
        """Region masks of the active uses at the size of a latent, as ComfyUI crops and batches latents themselves.

        Args:
            active: Indices of the uses.
            x: The latents, (images, channels, height, width).
        """
        conds: dict[str, CONDNoiseShape] = {}
        for index in active:
            region = self.uses[index].use.regions
            if region is None:
                continue
            key = (index, x.shape[0], x.shape[2:], x.device)
            if key not in self.regions:
                resized = pool_area(region.to(x.device), (x.shape[2], x.shape[3]))
                self.regions[key] = resized[:, None].expand(x.shape[0], -1, -1, -1)
            conds[f"{REGION}{index}"] = CONDNoiseShape(self.regions[key])
        return conds

    def begin_step(self) -> None:
        """Forget what belongs to the step before."""
        self.offsets.clear()
        self.last_sigma = None
        self.num_nested = 0
        self.is_unfolded = False

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

    def clear(self) -> None:
        """Forget everything."""
        self.begin_step()
        for kept in (self.prepared, self.rows, self.regions):
            kept.clear()


def compute_dtype(model: Any) -> torch.dtype:
    """Float type that a BaseModel computes in, which is not always that of its weights."""
    return getattr(model, "manual_cast_dtype", None) or model.get_dtype()


def _float32(value: float) -> float:
    # sigmas arrive as float32: a bound that was rounded elsewhere would be off by one step
    return float(np.float32(value))
