"""A training run: opened, checked and planned before its first step."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..data.checking import warn_of_problems
from ..data.sources.opening import refuse_within
from ..data.sources.source import PairSource
from ..errors import InputError, MissingPackageError
from ..fitting.noise_schedule import NoiseSchedule
from ..method.adapter import AdapterSet
from ..method.adapter_files import load_adapters
from ..method.backends import require_fit
from ..packages import require
from ..pipeline.base_model import BaseModel
from ..pipeline.fingerprint import UNET_PARTS, model_fingerprint
from ..processes import MAX_WAIT, require_all_processes, require_shared_folder
from .checkpoints import Checkpoint, Checkpoints
from .config import TrainConfig
from .dataset import TrainingData, open_training_data
from .initialisation import new_adapters
from .injected_unet import InjectedUNet
from .optimization import make_optimizer
from .plan import Plan, estimate_saved_bytes
from .set_record import set_changes, write_record
from .validation import Validation

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

UNSUPPORTED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")
"""Accelerate's engines that take modules apart, which adapters inside another model's forward pass do not survive."""

FREE_ON_RESUME = {
    "model", "model_config", "data", "encoded",  # their contents are compared instead
    "out", "adapters",
    "batch_size", "gradient_accumulation",  # their product with the number of processes is
    "mixed_precision", "gradient_checkpointing",  # the effective precision is compared; the other changes nothing
    "workers", "log_every", "tracker", "checkpoint_every", "keep_checkpoints", "resume", "dry_run",
    "accept_changed_data",
    "validate_every", "validation_data", "validation_prompts", "validation_samples",
    "validation_steps", "validation_image_guidance", "validation_cfg",
}  # fmt: skip
"""Fields that a resumed run may change without being another run."""

TRAINING_SET = "training set"
"""Entry of a run's identity."""

MAX_READ_THROUGH = 4000
"""Pairs of the largest set that is read through before the first step."""


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that a run works with; nothing is trained and nothing written yet.

    Attributes:
        config: Its settings.
        accelerator: Hugging Face's ``Accelerator`` of this process.
        base: The frozen base model.
        data: The training set.
        schedule: Noise levels of the base model and what it predicts.
        module: The U-Net with the adapters.
        optimizer: Of the adapters.
        identity: What makes it this run: a checkpoint of another one is refused.
        checkpoints: Those in its folder.
        start: The checkpoint that it goes on from; ``None``: it begins anew.
        validation: Draws images meanwhile, on the main process; ``None``: not wanted.
    """

    config: TrainConfig
    accelerator: Any
    base: BaseModel
    data: TrainingData
    schedule: NoiseSchedule
    module: InjectedUNet
    optimizer: torch.optim.Optimizer
    identity: Mapping[str, Any]
    checkpoints: Checkpoints
    start: Checkpoint | None
    validation: Validation | None

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.checkpoints.run_folder

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all processes."""
        return _global_batch(self.config, self.accelerator)

    @cached_property
    def plan(self) -> Plan:
        """What the run will do and need."""
        config, adapters = self.config, self.module.adapters
        return Plan(
            num_parameters=adapters.num_parameters,
            num_samples=len(self.data),
            num_images=len(self.data) if self._images is None else len(self._images.distinct),
            resolution=self.data.resolution,
            folder=self.folder,
            first_step=0 if self.start is None else self.start.step,
            num_steps=config.steps,
            global_batch=self.global_batch,
            num_processes=self.accelerator.num_processes,
            device=_describe_device(self.accelerator),
            weights=sum(weight.nbytes for part in self.base.parts for weight in part.parameters()),
            # weight, gradient and AdamW's two moments
            trained=adapters.nbytes * (4 + (config.ema_decay is not None)),
            activations=estimate_saved_bytes(
                self.module,
                batch_size=config.batch_size,
                target_px=self.data.sizes[0],
                reference_px=self.data.resolution,
                dtype=self.base.pipeline.dtype,
                is_checkpointed=config.gradient_checkpointing,
            ),
            num_checkpoints=config.keep_checkpoints,
        )

    def check(self) -> None:
        """Check all that can be checked without writing a file: disk, memory, steps; a set of moderate size is read through.

        Raises:
            InputError: There is no room for checkpoints, or the run has more steps than it is to have.
        """
        device = self.accelerator.device
        free_memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        self.plan.require_room(self.folder, self.checkpoints.num_bytes, free_memory)
        if self.start is not None and self.start.step > self.config.steps:
            raise InputError(
                f"The run has {self.start.step} steps behind it, and steps = {self.config.steps} is asked for. Set steps higher."
            )
        source = self._images
        if (
            self.accelerator.is_main_process
            and (self.start is None or self.config.accept_changed_data)
            and source is not None
            and len(source.distinct) <= MAX_READ_THROUGH
        ):
            warn_of_problems(
                source, resolution=self.data.resolution, has_buckets=self.config.buckets
            )

    def begin(self) -> None:
        """Check the run, then write down what it is.

        Raises:
            InputError: See ``check``.
            StateError: The processes do not see one folder.
        """
        self.check()
        require_shared_folder(self.folder, self.accelerator)
        if self.accelerator.is_main_process:
            self.checkpoints.write_identity(self.identity, self.config.to_dict())
            if self._images is not None:
                write_record(self.folder, self._images)
        self.accelerator.wait_for_everyone()

    @property
    def _images(self) -> PairSource | None:
        """The set, where training reads it itself."""
        return self.data.source if self.data.encoded is None else None


def open_run(config: TrainConfig) -> Run:
    """Open model, data and folder of a run and check that they fit.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
    """
    checkpoints = Checkpoints(Path(config.out), config.keep_checkpoints)
    if config.data is not None:
        refuse_within(config.out, config.data)
    if not config.resume:
        checkpoints.require_free()
    accelerator = _make_accelerator(config)
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    base = BaseModel(config.model, config.model_config, dtype)
    data = open_training_data(config, base)
    schedule = NoiseSchedule(base.scheduler.alphas_cumprod, base.scheduler.config.prediction_type)
    adapters = _starting_adapters(config, base, schedule.prediction)
    module = InjectedUNet(base.unet, adapters)
    optimizer = make_optimizer(
        config.optimizer,
        adapters.parameters(),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    identity = {
        **_own_settings(config),
        "resolution": data.resolution,
        "layers": list(adapters.layers),
        "timestep": adapters.info.timestep,
        "prediction": schedule.prediction,
        "noise levels": _digest(schedule.alphas_cumprod),
        "base model": model_fingerprint(config.model, UNET_PARTS),
        TRAINING_SET: data.fingerprint,
        "precomputed set": None if data.encoded is None else data.encoded.index.identity,
        "samples per step (batch_size x gradient_accumulation x processes)": _global_batch(
            config, accelerator
        ),
        "mixed precision": accelerator.mixed_precision,
    }
    if config.resume and checkpoints.newest() is not None and data.encoded is None:
        _take_set_as_begun(identity, checkpoints, data, is_accepted=config.accept_changed_data)
    start = checkpoints.choose_start(identity) if config.resume else None
    validation = None
    if config.validate_every and accelerator.is_main_process:
        validation = Validation(base, config, data.source, data.resolution)
    return Run(
        config, accelerator, base, data, schedule, module, optimizer, identity, checkpoints, start,
        validation,
    )  # fmt: skip


def _take_set_as_begun(
    identity: dict[str, Any], checkpoints: Checkpoints, data: TrainingData, *, is_accepted: bool
) -> None:
    """Give the set the identity that the run was begun with, where it is the same but for times, or accepted as it is.

    Raises:
        InputError: The set has changed.
    """
    assert data.source is not None
    begun = checkpoints.read_identity().get(TRAINING_SET)
    if begun == identity[TRAINING_SET]:
        return
    changes = set_changes(checkpoints.run_folder, data.source)
    if changes and not is_accepted:
        raise InputError(
            f"The training set is not the one that the run in {checkpoints.run_folder} was begun on: {changes}. Go on with the "
            "set as it is now by --accept_changed_data, or put it back as it was."
        )
    if changes:
        logger.warning("The training set has changed since the run was begun: %s.", changes)
    identity[TRAINING_SET] = begun


def _describe_device(accelerator: Any) -> str:
    device = accelerator.device
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    precision = accelerator.mixed_precision
    return f"{device}{name}, {'float32' if precision == 'no' else precision}"


def _global_batch(config: TrainConfig, accelerator: Any) -> int:
    return config.batch_size * config.gradient_accumulation * accelerator.num_processes


def _own_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings in which a run must agree with its checkpoints."""
    free = FREE_ON_RESUME | ({"steps"} if config.lr_schedule.startswith("constant") else set())
    return {name: value for name, value in config.to_dict().items() if name not in free}


def _digest(levels: torch.Tensor) -> str:
    return hashlib.sha256(levels.double().cpu().numpy().tobytes()).hexdigest()


def _starting_adapters(config: TrainConfig, base: BaseModel, prediction: str) -> AdapterSet:
    if config.adapters is not None:
        adapters = load_adapters(config.adapters)
        require_fit(base.unet, adapters.info.layout, "the adapters to start from are for")
        logger.info("init, layers and timestep are those of %s.", config.adapters)
        return adapters
    return new_adapters(
        base.unet,
        init=config.init,
        seed=config.seed,
        layers=config.layers or None,
        timestep=config.timestep,
        base_model=base.name,
        prediction=prediction,
    )


def precision(config: TrainConfig) -> str | None:
    """Float type for accelerate; ``None`` leaves it to accelerate's own settings."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    if "ACCELERATE_MIXED_PRECISION" in os.environ or not torch.cuda.is_available():
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _make_accelerator(config: TrainConfig) -> Any:
    with require("accelerate", "train"):
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
    accumulation = GradientAccumulationPlugin(
        num_steps=config.gradient_accumulation, sync_with_dataloader=False
    )
    # accelerate leaves a tracker that is not installed out without a word
    if config.tracker != "none" and config.tracker not in map(str, get_available_trackers()):
        raise MissingPackageError(
            f"The tracker {config.tracker} is not installed. Install it, or set tracker = none."
        )
    accelerator = Accelerator(
        mixed_precision=precision(config),
        gradient_accumulation_plugin=accumulation,
        step_scheduler_with_optimizer=False,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=MAX_WAIT)],
    )
    require_all_processes(accelerator.num_processes)
    if str(accelerator.distributed_type).split(".")[-1] in UNSUPPORTED:
        raise InputError(
            f"Training runs on one process or on several by DDP; accelerate is set to {accelerator.distributed_type}. "
            "The adapters are small, so that there is nothing to shard: run 'accelerate config' and choose neither "
            "FSDP nor DeepSpeed nor Megatron-LM."
        )
    if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
        logger.warning(
            "Training in float32: mixed_precision = bf16 takes half the memory and a fraction of the time."
        )
    return accelerator
