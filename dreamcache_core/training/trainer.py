"""A training run: opened, checked and planned before its first step."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, MissingPackageError, StateError
from ..method.adapter import AdapterSet
from ..method.adapter_files import load_adapters
from ..method.backends import require_fit
from ..packages import require
from ..pipeline.base_model import UNET_PARTS, BaseModel, model_fingerprint
from ..processes import MAX_WAIT, require_all_processes
from .config import TrainConfig
from .initialisation import new_adapters
from .injected_unet import InjectedUNet
from .interruption import catch_signals
from .loop import Loop
from .memory import estimate_saved_bytes
from .objective import NoiseSchedule
from .optimizers import make_optimizer
from .plan import Plan
from .run_folder import RunFolder
from .training_data import open_training_data
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
    "validate_every", "validation_data", "validation_prompts", "validation_samples",
    "validation_steps", "validation_image_guidance", "validation_cfg",
}  # fmt: skip
"""Fields that a resumed run may change without being another run."""


class Trainer:
    """One run: everything opened and checked, nothing trained and nothing written yet.

    Args:
        config: Settings of the run.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.accelerator = _make_accelerator(config)
        self.folder = RunFolder(config.out, config.keep_checkpoints)
        dtype = DTYPES.get(self.accelerator.mixed_precision, torch.float32)
        self.base = BaseModel(config.model, config.model_config, dtype)
        self.data = open_training_data(config, self.base)
        scheduler = self.base.scheduler
        self.schedule = NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)
        adapters = self._starting_adapters()
        self.module = InjectedUNet(self.base.unet, adapters)
        self.optimizer = make_optimizer(
            config.optimizer,
            adapters.parameters(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.identity = self._identity()
        self.checkpoint = self.folder.begin(self.identity, resume=config.resume)
        self.validation = None
        if config.validate_every and self.accelerator.is_main_process:
            self.validation = Validation(self.base, config, self.data.source, self.data.resolution)

    @property
    def starts_from_self_attention(self) -> bool:
        """Whether untrained adapters take their start values from the base model."""
        return self.config.adapters is None and self.config.init == "self_attention"

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all processes."""
        config = self.config
        return config.batch_size * config.gradient_accumulation * self.accelerator.num_processes

    @cached_property
    def plan(self) -> Plan:
        """What the run will do and need."""
        config, adapters = self.config, self.module.adapters
        parts = self.base.parts
        has_average = config.ema_decay is not None
        return Plan(
            num_parameters=adapters.num_parameters,
            num_samples=len(self.data),
            num_steps=config.steps,
            global_batch=self.global_batch,
            num_processes=self.accelerator.num_processes,
            weights=sum(weight.nbytes for part in parts for weight in part.parameters()),
            # weight, gradient and AdamW's two moments; in a checkpoint the weights twice, for training and for use
            adapters=adapters.nbytes * (4 + has_average),
            activations=estimate_saved_bytes(
                self.module,
                batch_size=config.batch_size,
                target_px=self.data.sizes[0],
                reference_px=self.data.resolution,
                dtype=self.base.pipeline.dtype,
                is_checkpointed=config.gradient_checkpointing,
            ),
            checkpoint=adapters.nbytes * (4 + has_average),
            num_checkpoints=config.keep_checkpoints,
        )

    def run(self) -> Path:
        """Train.

        Returns:
            File of the finished adapters.

        Raises:
            InputError: A sample cannot be read, or there is no room for a checkpoint.
            KeyboardInterrupt: The run was asked to stop; it saved a checkpoint first.
            StateError: The loss is not finite.
        """
        free = _free_memory(self.accelerator.device)
        self.plan.require_room(self.folder.path, self.folder.checkpoint_bytes, free)
        self._agree_on_checkpoint()
        if self.accelerator.is_main_process:
            self.folder.write_state(self.identity, self.config.to_dict())
        self.accelerator.wait_for_everyone()
        with catch_signals() as interruption:
            Loop(self, interruption).run()
        self.accelerator.end_training()
        return self.folder.adapters_file

    def _agree_on_checkpoint(self) -> None:
        """Refuse processes that see different checkpoints."""
        step = -1 if self.checkpoint is None else self.checkpoint[0]
        mine = torch.tensor([step], device=self.accelerator.device)
        steps: Any = self.accelerator.gather(mine)
        if len(set(steps.tolist())) > 1:
            raise StateError(
                f"The processes found checkpoints of different steps in {self.folder.path} ({steps.tolist()}; -1: none). "
                "Give all machines the same folder, on a shared file system."
            )
        if step > self.config.steps:
            raise InputError(
                f"The run has {step} steps behind it, and steps = {self.config.steps} is asked for. Set steps higher."
            )

    def _starting_adapters(self) -> AdapterSet:
        config, unet = self.config, self.base.unet
        if config.adapters is not None:
            adapters = load_adapters(config.adapters)
            require_fit(unet, adapters.info.layout, "the adapters to start from")
            logger.info("init, layers and timestep are those of %s.", config.adapters)
            return adapters
        return new_adapters(
            unet,
            init=config.init,
            seed=config.seed,
            layers=config.layers or None,
            timestep=config.timestep,
            base_model=self.base.name,
            prediction=self.schedule.prediction,
        )

    def _identity(self) -> dict[str, Any]:
        free = set(FREE_ON_RESUME)
        if self.config.lr_schedule.startswith("constant"):
            free |= {"steps"}
        kept = {k: v for k, v in self.config.to_dict().items() if k not in free}
        info = self.module.adapters.info
        levels = self.schedule.alphas_cumprod.double().cpu().numpy().tobytes()
        encoded = self.data.encoded
        return {
            **kept,
            "resolution": self.data.resolution,
            "layers": list(info.layout.layers),
            "timestep": info.timestep,
            "prediction": self.schedule.prediction,
            "noise levels": hashlib.sha256(levels).hexdigest(),
            "base model": model_fingerprint(self.config.model, UNET_PARTS),
            "training set": self.data.fingerprint,
            "precomputed set": None if encoded is None else encoded.index.identity,
            "samples per step (batch_size x gradient_accumulation x processes)": self.global_batch,
            "mixed precision": self.accelerator.mixed_precision,
        }


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
        mixed_precision=None if config.mixed_precision == "auto" else config.mixed_precision,
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


def _free_memory(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
