"""Everything that a training run can be told; each field is a key of the TOML file and a flag."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import Config, check_range
from ..data.augmentation import ERASE_HELP, FLIP_HELP, JITTER_HELP, Alterations
from ..errors import InputError
from .initialisation import Init

MixedPrecision = Literal["auto", "no", "fp16", "bf16"]
LrSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]
Tracker = Literal["tensorboard", "wandb", "none"]

PATHS = ("data", "encoded", "model", "model_config", "out", "adapters", "validation_data")
"""Fields that name files or folders."""


@dataclass(frozen=True)
class TrainConfig(Config):
    """Train DreamCache adapters on images with masks and captions."""

    model: str = field(metadata={"help": "base model: diffusers folder or single-file checkpoint"})
    out: str = field(metadata={"help": "folder of the run: checkpoints, log, final adapters"})
    data: str | None = field(
        default=None, metadata={"help": "training set: folder, manifest, shards or parquet"}
    )
    encoded: str | None = field(
        default=None, metadata={"help": "precomputed latents of it, from 'dataset encode'"}
    )
    model_config: str | None = field(
        default=None, metadata={"help": "for a single file: a diffusers folder like it"}
    )
    adapters: str | None = field(
        default=None, metadata={"help": "adapter file to start from; else untrained ones"}
    )
    init: Init = field(default="identity", metadata={"help": "start values of untrained adapters"})
    layers: list[str] = field(
        default_factory=list[str],
        metadata={"help": "layers to adapt, ldm names; none: the paper's"},
    )
    timestep: int = field(
        default=1, metadata={"help": "training index at which references are cached, 0 to 999"}
    )
    reference_caption: bool = field(
        default=False,
        metadata={"help": "cache references under their caption, not the empty prompt"},
    )
    resolution: int | None = field(
        default=None, metadata={"help": "side of the images in pixels; else the model's"}
    )
    buckets: bool = field(
        default=False, metadata={"help": "keep the targets' aspect: buckets of equal area"}
    )
    reference_flip: bool = field(default=True, metadata=FLIP_HELP)
    reference_jitter: bool = field(default=True, metadata=JITTER_HELP)
    reference_erase: bool = field(default=True, metadata=ERASE_HELP)
    steps: int = field(default=25_000, metadata={"help": "optimizer steps of the run"})
    batch_size: int = field(default=4, metadata={"help": "images per process and forward pass"})
    gradient_accumulation: int = field(
        default=1, metadata={"help": "forward passes per optimizer step"}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "learning rate after the warm-up"})
    lr_schedule: LrSchedule = field(
        default="constant", metadata={"help": "course of the learning rate"}
    )
    warmup_steps: int = field(
        default=0, metadata={"help": "steps in which the learning rate rises from 0"}
    )
    optimizer: str = field(
        default="AdamW", metadata={"help": "name in torch.optim, or bitsandbytes (AdamW8bit)"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay of the optimizer"})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "gradients are clipped to this norm; 0 = not"}
    )
    min_snr_gamma: float | None = field(
        default=None, metadata={"help": "min-SNR loss weights; none: uniform"}
    )
    caption_dropout: float = field(
        default=0.07, metadata={"help": "share of samples that get the empty prompt"}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "keep a moving average of the adapters, 0.999 say"}
    )
    mixed_precision: MixedPrecision = field(
        default="auto", metadata={"help": "auto: what accelerate is set to"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "less memory, a fifth more time"}
    )
    seed: int = field(default=0, metadata={"help": "seed of order, noise and augmentation"})
    workers: int = field(
        default=2, metadata={"help": "processes that read images, per training process"}
    )
    log_every: int = field(default=10, metadata={"help": "steps between two entries of the log"})
    tracker: Tracker = field(
        default="tensorboard", metadata={"help": "where curves and grids go besides the folder"}
    )
    checkpoint_every: int = field(
        default=500, metadata={"help": "steps between two checkpoints; 0: only at the end"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints that are kept"})
    resume: bool = field(
        default=False, metadata={"help": "go on from the newest checkpoint in out"}
    )
    validate_every: int = field(
        default=500, metadata={"help": "steps between two validation grids; 0: none"}
    )
    validation_data: str | None = field(
        default=None, metadata={"help": "set of the validation; else the training set"}
    )
    validation_prompts: list[str] = field(
        default_factory=list[str],
        metadata={"help": "prompts of the validation; none: the captions of its samples"},
    )
    validation_samples: int = field(default=4, metadata={"help": "references in a validation grid"})
    validation_steps: int = field(
        default=25, metadata={"help": "sampling steps of a validation image"}
    )
    validation_image_guidance: float = field(
        default=1.0, metadata={"help": "image guidance of a validation image"}
    )
    validation_cfg: float = field(
        default=7.5, metadata={"help": "text guidance of a validation image"}
    )
    dry_run: bool = field(default=False, metadata={"help": "print the plan and stop"})

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            InputError: A number is out of range, or there is nothing to train on.
        """
        if self.data is None and self.encoded is None:
            raise InputError(
                "Expected data (a training set) or encoded (its precomputed form); given neither."
            )
        if self.encoded is not None and self.buckets:
            raise InputError(
                "A precomputed set has the sizes that it was made with: give buckets to 'dataset encode', not here."
            )
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, low)
        side = self.resolution
        if side is not None and (side % 8 or not 64 <= side <= 2048):
            raise InputError(f"resolution must be a multiple of 8 in 64 ... 2048; given {side}.")
        for name in ("caption_dropout", "ema_decay"):
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, 0, 1)
        self._check_schedule()
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be above 0; given {self.learning_rate}.")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise InputError(f"min_snr_gamma must be above 0; given {self.min_snr_gamma}.")

    def _check_schedule(self) -> None:
        if self.warmup_steps and self.lr_schedule == "constant":
            raise InputError(
                f"lr_schedule = constant has no warm-up; given warmup_steps = {self.warmup_steps}. Set lr_schedule = "
                "constant_with_warmup."
            )
        if self.warmup_steps >= self.steps:
            raise InputError(
                f"warmup_steps must be below steps; given {self.warmup_steps} and {self.steps}."
            )
        if self.lr_schedule == "polynomial" and self.learning_rate <= LOWEST_POLYNOMIAL_RATE:
            raise InputError(
                f"lr_schedule = polynomial ends at {LOWEST_POLYNOMIAL_RATE}: learning_rate must be above; given "
                f"{self.learning_rate}."
            )

    @property
    def alterations(self) -> Alterations:
        """What may happen to references."""
        return Alterations(self.reference_flip, self.reference_jitter, self.reference_erase)

    def without_folders(self) -> dict[str, Any]:
        """Return the fields with files by name only, so that a published adapter gives no folder away."""
        values = self.to_dict()
        for name in PATHS:
            values[name] = values[name] and Path(values[name]).resolve().name
        return values


LOWEST_POLYNOMIAL_RATE = 1e-7

_LOWEST = {
    "steps": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "validate_every": 0,
    "validation_samples": 1,
    "validation_steps": 1,
    "validation_image_guidance": 0,
    "validation_cfg": 0,
}
