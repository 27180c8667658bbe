"""The steps of a run: METHOD.md section 7 as a loop, on Hugging Face Accelerate."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import InputError, StateError
from ..method.adapter import AdapterInfo, AdapterSet
from ..method.adapter_files import save_adapters
from ..pipeline.latents import LATENT_FACTOR
from ..pipeline.sampling import Text
from ..version import __version__
from .interruption import Interruption
from .meter import Meter, TakenStep
from .moving_average import MovingAverage
from .objective import denoising_loss
from .samples import FAILURE
from .self_attention_start import NUM_IMAGES, observe_self_attention, start_from_self_attention

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)


MAX_SKIPPED = 50
"""Steps in a row that an overflow may cost in float16."""


class Loop:
    """The steps of a run: models on their device, the loader, the counters."""

    def __init__(self, trainer: Trainer, interruption: Interruption) -> None:
        self.trainer, self.interruption = trainer, interruption
        self.config, self.accelerator = trainer.config, trainer.accelerator
        self.base, self.folder, self.schedule = trainer.base, trainer.folder, trainer.schedule
        self.base.to(self.accelerator.device)
        if self.config.gradient_checkpointing:
            self.base.unet.enable_gradient_checkpointing()
        self.step = 0 if trainer.checkpoint is None else trainer.checkpoint[0]
        self.empty = self.base.encode_text([""])
        if trainer.checkpoint is None and trainer.starts_from_self_attention:
            self._start_from_self_attention()
        self.model, self.optimizer, self.loader, self.lr_schedule = self._prepare()
        parameters = trainer.module.adapters.parameters
        self.average = MovingAverage.of(parameters, self.config.ema_decay)
        if trainer.checkpoint is not None:
            self._restore(trainer.checkpoint[1])
        self._losses: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._is_asked_to_stop, self._num_skipped = False, 0

    def _loader(self) -> DataLoader[dict[str, object]]:
        trainer, channels = self.trainer, int(self.base.unet.config.in_channels)
        first = self.step * trainer.global_batch
        return trainer.data.loader(self.config, first, trainer.global_batch, channels)

    @torch.no_grad()
    def _start_from_self_attention(self) -> None:
        """Look at the run's first references, in every process at the same ones."""
        from accelerate.utils import send_to_device

        module, seen = self.trainer.module, 0
        timestep = module.adapters.info.timestep
        with observe_self_attention(self.base.unet, module.adapters.layers) as guesses:
            for batch in self._loader():
                self._require_readable(batch)
                noised = self._noised_reference(send_to_device(batch, self.accelerator.device))
                text = self.empty.repeat_each(len(noised))
                module.call_plain(
                    noised.to(self.base.pipeline.dtype),
                    torch.full((len(noised),), timestep, device=noised.device),
                    text.states,
                    self.base.unet_kwargs(text, *self._reference_size_px),
                )
                seen += len(noised)
                if seen >= NUM_IMAGES:
                    break
        start_from_self_attention(self.base.unet, module.adapters, guesses)

    def _prepare(self) -> tuple[Any, ...]:
        from diffusers.optimization import get_scheduler

        config, trainer = self.config, self.trainer
        lr_schedule = get_scheduler(
            config.lr_schedule,
            trainer.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
        )
        return self.accelerator.prepare(
            trainer.module, trainer.optimizer, self._loader(), lr_schedule
        )

    def _restore(self, checkpoint: Path) -> None:
        self.accelerator.load_state(str(checkpoint))
        self.accelerator.step = 0  # a checkpoint lies between steps, however they are accumulated
        self.average.load(checkpoint, self.step)
        logger.info("Going on from %s.", checkpoint)

    def run(self) -> None:
        """Run all steps that are left, and write the adapters."""
        self._start_trackers()
        meter = Meter(self)
        try:
            self._run_steps(meter)
        finally:
            meter.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self._save_checkpoint()
        self._save_adapters(self.folder.adapters_file)

    def _run_steps(self, meter: Meter) -> None:
        if self.accelerator.is_main_process:
            self.folder.cut_log(self.step)
        if self.step == 0:
            self._validate()
        meter.resume()
        for batch in self.loader:
            taken = self.take(batch)
            if taken is not None:
                meter.count(taken)
                self.finish_step()
                meter.resume()

    def take(self, batch: Mapping[str, Any]) -> TakenStep | None:
        """Take a batch in, and with the last batch of a step take the step.

        Args:
            batch: From the loader.

        Returns:
            What the step was like; ``None`` within a step.

        Raises:
            InputError: A sample of the batch could not be read.
            StateError: The loss or the gradients are not finite; the step was not taken.
        """
        self._require_readable(batch)
        self._indices.append(batch["index"])
        with self.accelerator.accumulate(self.model), self.trainer.module.until_backward():
            loss = self.loss(batch)
            self._losses.append(loss.detach())
            self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return None
        most = self.config.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), most))
        taken = TakenStep(self._agree(norm), norm, self.lr_schedule.get_last_lr()[0])
        self.optimizer.step()
        if self.optimizer.step_was_skipped:  # fp16: the loss scale is being found
            self._count_skipped()
        else:
            self._num_skipped = 0
            self.lr_schedule.step()
            self.average.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._losses, self._indices = [], []
        return taken

    def _count_skipped(self) -> None:
        self._num_skipped += 1
        if self._num_skipped > MAX_SKIPPED:
            raise StateError(
                f"The gradients of {self._num_skipped} steps in a row up to step {self.step + 1} overflowed in float16. "
                "Use mixed_precision = bf16 or no."
            )

    def _require_readable(self, batch: Mapping[str, Any]) -> None:
        """Stop all processes where one could not read its batch, and keep what was learnt."""
        failure = batch.get(FAILURE)
        if self.accelerator.num_processes > 1:
            failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
            total: Any = self.accelerator.reduce(failed, reduction="sum")
            if failure is None and float(total) > 0:
                failure = "Another process could not read its batch; see its message."
        if failure is None:
            return
        if self.step:
            self._save_checkpoint()
        raise InputError(failure)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Loss of a batch (METHOD.md section 7)."""
        dtype, module = self.base.pipeline.dtype, self.trainer.module
        latent, noise, timesteps = self._target_latent(batch), batch["noise"], batch["timestep"]
        rows, (height, width) = len(latent), (side * LATENT_FACTOR for side in latent.shape[2:])
        text = self._text(batch)
        seen = text if self.config.reference_caption else self.empty.repeat_each(rows)
        with torch.no_grad():
            reference = module.capture(
                self._noised_reference(batch).to(dtype),
                seen.states,
                self.base.unet_kwargs(seen, *self._reference_size_px),
            )
        prediction = self.model(
            reference,
            self.schedule.add_noise(latent, noise, timesteps).to(dtype),
            timesteps,
            text.states,
            self.base.unet_kwargs(text, height, width),
        )
        return denoising_loss(
            prediction,
            self.schedule.target(latent, noise, timesteps),
            self.schedule.weights(timesteps, self.config.min_snr_gamma),
        )

    @property
    def _reference_size_px(self) -> tuple[int, int]:
        return self.trainer.data.resolution, self.trainer.data.resolution

    def _target_latent(self, batch: Mapping[str, Any]) -> Tensor:
        if "target_latent" in batch:
            return batch["target_latent"].float()
        return self.base.encode_images(batch["target"]).float()

    def _noised_reference(self, batch: Mapping[str, Any]) -> Tensor:
        if "reference_latent" in batch:
            latent = batch["reference_latent"].float()
        else:
            latent = self.base.encode_images(batch["reference"]).float()
        timestep = self.trainer.module.adapters.info.timestep
        timesteps = torch.full((len(latent),), timestep, device=latent.device)
        return self.schedule.add_noise(latent, batch["reference_noise"], timesteps)

    def _text(self, batch: Mapping[str, Any]) -> Text:
        """Text states of the captions, those of the empty prompt where the caption is dropped."""
        is_dropped = batch["is_dropped"]
        if "text_states" not in batch:
            dropped = is_dropped.tolist()
            pairs = zip(batch["caption"], dropped, strict=True)
            return self.base.encode_text(["" if drop else caption for caption, drop in pairs])
        like = self.empty.states
        states = torch.where(is_dropped[:, None, None], like, batch["text_states"].to(like.dtype))
        if self.empty.pooled is None:
            return Text(states, None)
        given = batch["text_pooled"].to(like.dtype)
        return Text(states, torch.where(is_dropped[:, None], self.empty.pooled, given))

    def _agree(self, norm: float) -> float:
        """Agree with all processes on the step's mean loss, and stop all where it is not finite."""
        local = torch.stack(self._losses).mean()
        asked = torch.tensor(float(self.interruption.is_requested), device=local.device)
        total: Any = self.accelerator.reduce(torch.stack([local, asked]), reduction="mean")
        loss, self._is_asked_to_stop = float(total[0]), bool(total[1] > 0)
        # with fp16 an infinite norm is part of how the loss scale is found
        is_scaled = self.accelerator.scaler is not None
        if math.isfinite(loss) and (is_scaled or math.isfinite(norm)):
            return loss
        files = self.trainer.data.names(torch.cat(self._indices).tolist())
        # weights are known to be good once a step was taken from them
        good = self.folder.newest_checkpoint(before=self.step)
        advice = (
            f"The last good checkpoint is {good[1]}: its adapters.safetensors can be given as adapters to a run of its own"
            if good
            else "There is no good checkpoint yet"
        )
        raise StateError(
            f"The loss of step {self.step + 1} is {loss}, the norm of the gradients {norm}; the step was not taken. "
            f"Its batch on process {self.accelerator.process_index}: {', '.join(files)}. "
            f"{advice}. Lower the learning rate, use bf16 in place of fp16, or look at these files."
        )

    def finish_step(self) -> None:
        """Save, stop or show after a step, as the settings and the user want."""
        config = self.config
        is_last = self.step == config.steps
        is_due = config.checkpoint_every and self.step % config.checkpoint_every == 0
        if is_due or is_last or self._is_asked_to_stop:
            self._save_checkpoint()
        if self._is_asked_to_stop:
            logger.warning("Stopped after step %d; go on with --resume.", self.step)
            raise KeyboardInterrupt
        if config.validate_every and (self.step % config.validate_every == 0 or is_last):
            self._validate()

    def _adapters(self) -> AdapterSet:
        """The adapters as they would be used: averaged where there is an average; on the CPU."""
        weights = self.accelerator.get_state_dict(self.model)
        module, info = self.trainer.module, self._info()
        adapters = AdapterSet(info)
        prefix = "adapters."
        adapters.load_state_dict({k.removeprefix(prefix): v.cpu() for k, v in weights.items()})
        self.average.copy_to(adapters)
        assert module.adapters.layers == adapters.layers
        return adapters.requires_grad_(False)

    def _info(self) -> AdapterInfo:
        info = self.trainer.module.adapters.info
        extra = {
            **info.extra,
            "training": json.dumps({**self.config.without_folders(), "step": self.step}),
            "base_model_fingerprint": self.trainer.identity["base model"],
            "dreamcache_version": __version__,
        }
        return AdapterInfo(
            info.layout, info.timestep, self.base.name, self.schedule.prediction, extra
        )

    def _save_adapters(self, path: Path) -> None:
        adapters = self._adapters()
        if self.accelerator.is_main_process:
            save_adapters(adapters, path)

    def _save_checkpoint(self) -> None:
        accelerator = self.accelerator
        newest = self.folder.newest_checkpoint()
        if newest is not None and newest[0] == self.step:
            return
        accelerator.wait_for_everyone()
        with self.folder.new_checkpoint(
            self.step, is_main=accelerator.is_main_process, wait=accelerator.wait_for_everyone
        ) as target:
            accelerator.save_state(str(target))
            self._save_adapters(target / "adapters.safetensors")
            if accelerator.is_main_process:
                self.average.save(target)

    def _validate(self) -> None:
        adapters = self._adapters() if self.config.validate_every else None
        validation = self.trainer.validation
        if validation is not None and adapters is not None:
            sheet = validation.save(adapters, self.folder.validation_folder, self.step)
            for tracker in self.accelerator.trackers:
                tracker.log_images({"validation": sheet.permute(0, 3, 1, 2)}, step=self.step)
        self.accelerator.wait_for_everyone()

    def _start_trackers(self) -> None:
        if self.config.tracker != "none":
            plain = {k: str(v) for k, v in self.config.to_dict().items()}
            self.accelerator.init_trackers("dreamcache", config=plain)
