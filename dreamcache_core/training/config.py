"""Everything that a training run can be told; each field is a key of the TOML file and a flag."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..config import Config, check_range
from ..data.augmentation import ALL_ALTERATIONS, NO_ALTERATIONS, Alterations
from ..errors import InputError
from ..fitting.fit import FitSettings
from ..fitting.noise_schedule import NUM_TIMESTEPS
from .initialisation import Init
from .objective import MIN_TIMESTEP

MixedPrecision = Literal["auto", "no", "fp16", "bf16"]
LrSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]
Tracker = Literal["tensorboard", "wandb", "none"]

PATHS = ("data", "encoded", "model", "model_config", "out", "adapters", "validation_data")
"""Fields that name files or folders."""


_SAME_AS = {
    "pretrained_model_name_or_path": "model",
    "instance_data_dir": "data",
    "train_data_dir": "data",
    "dataset_name": "data",
    "output_dir": "out",
    "network_weights": "adapters",
    "instance_prompt": "caption",
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "unet_lr": "learning_rate",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "warmup_steps",
    "optimizer_type": "optimizer",
    "use_8bit_adam": "optimizer",
    "snr_gamma": "min_snr_gamma",
    "proportion_empty_prompts": "caption_dropout",
    "use_ema": "ema_decay",
    "enable_bucket": "buckets",
    "size": "resolution",
    "max_data_loader_n_workers": "workers",
    "dataloader_num_workers": "workers",
    "report_to": "tracker",
    "log_with": "tracker",
    "checkpointing_steps": "checkpoint_every",
    "save_every_n_steps": "checkpoint_every",
    "checkpoints_total_limit": "keep_checkpoints",
    "resume_from_checkpoint": "resume",
    "validation_prompt": "validation_prompts",
    "sample_every_n_steps": "validate_every",
    "reference_flip": "keep_reference",
    "reference_jitter": "keep_reference",
    "reference_erase": "keep_reference",
}
"""What diffusers' examples and kohya's scripts call the fields."""

_NOT_NEEDED = (
    "xformers",
    "enable_xformers_memory_efficient_attention",
    "sdpa",
    "mem_eff_attn",
    "allow_tf32",
    "network_module",
    "cache_latents",
    "cache_latents_to_disk",
    "center_crop",
    "caption_extension",
    "save_model_as",
)

_EPOCHS = "Give 'steps': epochs x images / batch_size; the plan tells the epochs."
_NO_RANK = "Adapters have no rank: leave it out."
_NOT_THERE = "There is nothing of the kind here: leave it out."
_ANSWERS = {
    "epochs": _EPOCHS,
    "max_train_epochs": _EPOCHS,
    "num_train_epochs": _EPOCHS,
    "network_dim": _NO_RANK,
    "network_alpha": _NO_RANK,
    "rank": _NO_RANK,
    "clip_skip": _NOT_THERE,
    "noise_offset": _NOT_THERE,
    "shuffle_caption": _NOT_THERE,
    "keep_tokens": _NOT_THERE,
    "prior_loss_weight": _NOT_THERE,
    "reg_data_dir": _NOT_THERE,
}


@dataclass(frozen=True)
class TrainConfig(Config):
    """Train DreamCache adapters on images with masks and captions.

    Further settings, which hardly anybody changes, are in docs/training.md.

    Attributes:
        model: Base model: diffusers folder or single-file checkpoint.
        out: Folder of the run: checkpoints, log, final adapters; else runs/ and the set's name.
        data: Training set: folder, manifest, shards or parquet; as the first word it needs no flag.
        caption: Caption of images that have none.
        encoded: Precomputed latents of it, from 'dataset encode'.
        model_config: For a single file not of Stable Diffusion 1.x or SDXL: a diffusers folder like it.
        adapters: Adapter file to start from; else untrained ones.
        init: Start values of untrained adapters.
        layers: Layers to adapt, ldm names; none: the paper's.
        timestep: Training index at which references are cached, 0 to 999.
        reference_caption: Cache references under their caption, not the empty prompt.
        resolution: Side of the images in pixels; else the model's.
        buckets: Keep the targets' aspect: buckets of equal area.
        keep_reference: References are never mirrored, recoloured or partly erased: for lettering and exact colours.
        steps: Optimizer steps of the run.
        batch_size: Images per process and forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        learning_rate: Learning rate after the warm-up.
        lr_schedule: Course of the learning rate.
        warmup_steps: Steps in which the learning rate rises from 0.
        optimizer: Name in torch.optim, or bitsandbytes (AdamW8bit).
        weight_decay: Weight decay of the optimizer.
        max_grad_norm: Gradients are clipped to this norm; 0 = not.
        min_snr_gamma: Gamma of the min-SNR loss weights; none: uniform weights.
        min_timestep: Least noise that targets get, training index, 0 to 999.
        caption_dropout: Share of samples that get the empty prompt.
        ema_decay: Keep a moving average of the adapters, 0.999 say.
        mixed_precision: Float type of the forward pass; auto: what accelerate is set to, else what the GPU does best.
        gradient_checkpointing: Trade a fifth more time for less memory.
        seed: Seed of order, noise and augmentation.
        workers: Processes that read images, per training process.
        log_every: Steps between two entries of the log.
        tracker: Where curves and grids go besides the folder.
        checkpoint_every: Steps between two checkpoints; 0: only at the end.
        keep_checkpoints: Newest checkpoints that are kept.
        resume: Go on from the newest checkpoint of the run.
        accept_changed_data: Resume although samples were changed, added or removed.
        validate_every: Steps between two validation grids; 0: none.
        validation_data: Set of the validation; else the training set.
        validation_prompts: Prompts of the validation; none: the captions of its samples.
        validation_samples: References in a validation grid.
        validation_steps: Sampling steps of a validation image.
        validation_image_guidance: Image guidance of a validation image.
        validation_cfg: Text guidance of a validation image.
        dry_run: Print the plan and stop.
    """

    elsewhere: ClassVar[Mapping[str, str]] = (
        {name: f"It is called {here!r} here." for name, here in _SAME_AS.items()}
        | dict.fromkeys(_NOT_NEEDED, "It is not needed: leave it out.")
        | _ANSWERS
    )
    seldom: ClassVar[frozenset[str]] = frozenset({
        "init", "layers", "timestep", "min_timestep", "reference_caption", "caption_dropout", "min_snr_gamma",
        "ema_decay", "weight_decay", "max_grad_norm", "log_every", "keep_checkpoints",
        "validation_samples", "validation_steps", "validation_image_guidance", "validation_cfg",
    })  # fmt: skip

    model: str
    out: str = ""
    data: str | None = None
    caption: str | None = None
    encoded: str | None = None
    model_config: str | None = None
    adapters: str | None = None
    init: Init = "fitted"
    layers: list[str] = field(default_factory=list[str])
    timestep: int = FitSettings.timestep
    reference_caption: bool = False
    resolution: int | None = None
    buckets: bool = False
    keep_reference: bool = False
    steps: int = 1000
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    lr_schedule: LrSchedule = "constant"
    warmup_steps: int = 0
    optimizer: str = "AdamW"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    min_snr_gamma: float | None = None
    min_timestep: int = MIN_TIMESTEP
    caption_dropout: float = 0.07
    ema_decay: float | None = None
    mixed_precision: MixedPrecision = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    workers: int = 2
    log_every: int = 10
    tracker: Tracker = "tensorboard"
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    resume: bool = False
    accept_changed_data: bool = False
    validate_every: int = 500
    validation_data: str | None = None
    validation_prompts: list[str] = field(default_factory=list[str])
    validation_samples: int = 4
    validation_steps: int = 25
    validation_image_guidance: float = 1.0
    validation_cfg: float = 7.5
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            InputError: A number is out of range, or there is nothing to train on.
        """
        if self.data is None and self.encoded is None:
            raise InputError(
                "Expected data (a training set) or encoded (its precomputed form); given neither."
            )
        if not self.out:
            name = Path(self.data or self.encoded or "").resolve().stem
            object.__setattr__(self, "out", str(Path("runs") / name))
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
        check_range("min_timestep", self.min_timestep, 0, NUM_TIMESTEPS - 1)
        check_range("seed", self.seed, 0, 2**63 - 1)
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

    @property
    def alterations(self) -> Alterations:
        """What may happen to references."""
        return NO_ALTERATIONS if self.keep_reference else ALL_ALTERATIONS

    def without_folders(self) -> dict[str, Any]:
        """Return the fields with files by name only, so that a published adapter gives no folder away."""
        values = self.to_dict()
        for name in PATHS:
            values[name] = values[name] and Path(values[name]).resolve().name
        return values


_LOWEST = {
    "steps": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
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
