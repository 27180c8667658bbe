"""The steps of a run: METHOD.md section 7 as a loop, on Hugging Face Accelerate."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import DreamCacheError, InputError, StateError
from ..files.jsonl import append_lines
from ..fitting.fit import NUM_PASSES, FitSettings, without_fit
from ..method.adapter import AdapterSet
from ..method.adapter_files import save_adapters
from ..pipeline.fingerprint import FINGERPRINT
from ..pipeline.fitting import adapters_from_model
from ..processes import Interruption, catch_signals
from ..version import __version__
from .checkpoints import ADAPTERS_FILE, Checkpoint, cut_log
from .dataset import FAILURE, SKIPPED
from .initialisation import FITS
from .injected_unet import Objective
from .optimization import MovingAverage
from .run import Run
from .validation import Validation

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"

MAX_SKIPPED = 50
"""Steps in a row that an overflow may cost in float16."""

EARLY_GRIDS = (50, 100)
"""Steps after which a grid is drawn besides those that ``validate_every`` asks for."""

NOTHING_YET = (
    "Stopped before the first step: there is nothing to save yet, and the same command begins anew."
)


def train(run: Run) -> Path:
    """Train, and return the file of the finished adapters.

    Raises:
        InputError: A sample cannot be read, or there is no room for a checkpoint.
        KeyboardInterrupt: The run was asked to stop; after the first step it saved a checkpoint first.
        StateError: The loss is not finite.
    """
    run.begin()
    with catch_signals() as interruption:
        Loop(run, interruption).train()
    run.accelerator.end_training()
    return run.folder / ADAPTERS_FILE


class TakenStep(NamedTuple):
    """One optimizer step: mean loss over all processes, norm of its gradients before clipping, learning rate."""

    loss: float
    gradient_norm: float
    learning_rate: float


class Loop:
    """The steps of a run: models on their device, the loader, the counters."""

    def __init__(self, run: Run, interruption: Interruption) -> None:
        self.run, self.interruption = run, interruption
        self.config, self.accelerator = run.config, run.accelerator
        run.base.to(self.accelerator.device)
        if self.config.gradient_checkpointing:
            run.base.unet.enable_gradient_checkpointing()
        self.objective = Objective(
            run.base, run.module, run.schedule, self.config, run.data.resolution
        )
        self.step = 0 if run.start is None else run.start.step
        is_untrained = run.start is None and self.config.adapters is None
        if is_untrained and self.config.init in FITS:
            self._fit(FITS[self.config.init])
        self.model, self.optimizer, self.loader, self.lr_schedule = self._prepare()
        self.average = MovingAverage(run.module.adapters.parameters(), self.config.ema_decay)
        if run.start is not None:
            self._restore(run.start)
        self._losses: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._is_asked_to_stop, self._num_skipped = False, 0
        self._named: set[str] = set()

    def _fit(self, settings: FitSettings) -> None:
        """Fit the adapters to the base model, in every process alike."""
        run, adapters = self.run, self.run.module.adapters
        with tqdm(
            total=NUM_PASSES, desc="fitting", disable=not self.accelerator.is_main_process
        ) as bar:

            def after_pass() -> None:
                bar.update(1)
                if self.interruption.is_requested:
                    logger.warning(NOTHING_YET)
                    raise KeyboardInterrupt

            fitted = adapters_from_model(
                run.base.pipeline,
                layers=adapters.layers,
                settings=dataclasses.replace(settings, timestep=adapters.info.timestep),
                size=run.data.resolution,
                seed=self.config.seed,
                on_pass=after_pass,
            )
        adapters.load_state_dict(fitted.state_dict())

    def _prepare(self) -> tuple[Any, ...]:
        from diffusers.optimization import get_scheduler

        run, channels = self.run, int(self.run.base.unet.config.in_channels)
        first = self.step * run.global_batch
        loader = run.data.loader(self.config, first, run.global_batch, channels)
        lr_schedule = get_scheduler(
            self.config.lr_schedule,
            run.optimizer,
            num_warmup_steps=self.config.warmup_steps,
            num_training_steps=self.config.steps,
        )
        return self.accelerator.prepare(run.module, run.optimizer, loader, lr_schedule)

    def _restore(self, checkpoint: Checkpoint) -> None:
        try:
            self.accelerator.load_state(str(checkpoint.path))
            self.average.load(checkpoint.path, checkpoint.step)
        except DreamCacheError:
            raise
        except Exception as error:  # a damaged file of torch can raise nearly anything
            raise self.run.checkpoints.damaged(
                checkpoint, f"{type(error).__name__}: {error}"
            ) from error
        self.accelerator.step = 0  # a checkpoint lies between steps, however they are accumulated
        logger.info("Going on from %s.", checkpoint.path)

    def train(self) -> None:
        """Run all steps that are left, and write the adapters."""
        if self.config.tracker != "none":
            plain = {k: str(v) for k, v in self.config.to_dict().items()}
            self.accelerator.init_trackers("dreamcache", config=plain)
        try:
            self._take_steps()
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self._save_checkpoint()
        self._save_adapters(self.run.folder / ADAPTERS_FILE)

    def _take_steps(self) -> None:
        if self.accelerator.is_main_process:
            cut_log(self.run.folder / LOG_FILE, self.step)
        if self.step == 0:
            self._validate()
            if self._is_any(self.interruption.is_requested):
                logger.warning(NOTHING_YET)
                raise KeyboardInterrupt
        with closing(Meter(self.run, self.step)) as meter:
            for batch in self.loader:
                taken = self.take(batch)
                if taken is not None:
                    meter.count(self.step, taken)
                    self.finish_step()
                    meter.resume()

    def take(self, batch: Mapping[str, Any]) -> TakenStep | None:
        """Take a batch in, and with the last batch of a step take the step; ``None`` is returned within a step.

        Raises:
            InputError: A sample of the batch could not be read.
            StateError: The loss or the gradients are not finite; the step was not taken.
        """
        self._require_readable(batch)
        self._indices.append(batch["index"])
        with self.accelerator.accumulate(self.model), self.run.module.until_backward():
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

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Loss of a batch; call it inside ``InjectedUNet.until_backward``."""
        return self.objective.loss(self.model, batch)

    def _count_skipped(self) -> None:
        self._num_skipped += 1
        if self._num_skipped > MAX_SKIPPED:
            raise StateError(
                f"The gradients of {self._num_skipped} steps in a row up to step {self.step + 1} overflowed in float16. "
                "Use mixed_precision = bf16 or no."
            )

    def _require_readable(self, batch: Mapping[str, Any]) -> None:
        """Name samples that were skipped; stop all processes where one has no batch, and keep what was learnt."""
        for message in set(batch.get(SKIPPED, [])) - self._named - {""}:
            self._named.add(message)
            logger.warning("%s Another takes its place.", message)
        failure = batch.get(FAILURE)
        if self._is_any(failure is not None) and failure is None:
            failure = "Another process could not read its batch; see its message."
        if failure is None:
            return
        if self.step:
            self._save_checkpoint()
        raise InputError(failure)

    def _is_any(self, holds: bool) -> bool:
        """Tell whether something holds in any process."""
        if self.accelerator.num_processes == 1:
            return holds  # a device need not be waited for
        here = torch.tensor(float(holds), device=self.accelerator.device)
        total: Any = self.accelerator.reduce(here, reduction="sum")
        return float(total) > 0

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
        files = [self.run.data.files(i)[0] for i in torch.cat(self._indices).tolist()]
        # weights are known to be good once a step was taken from them
        good = self.run.checkpoints.newest(before=self.step)
        advice = (
            f"The last good checkpoint is {good.path}: its {ADAPTERS_FILE} can be given as adapters to a run of its own"
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
            logger.warning(
                "Stopped after step %d; what was learnt is in %s. Go on with the same command and --resume.",
                self.step,
                self.run.checkpoints.folder,
            )
            raise KeyboardInterrupt
        if config.validate_every and (
            self.step % config.validate_every == 0 or is_last or self.step in EARLY_GRIDS
        ):
            self._validate()

    def _adapters(self) -> AdapterSet:
        """The adapters as they would be used: averaged where there is an average; on the CPU."""
        run = self.run
        trained = run.module.adapters
        training = {**self.config.without_folders(), "step": self.step}
        info = dataclasses.replace(
            trained.info,
            base_model=run.base.name,
            prediction=run.schedule.prediction,
            extra={
                **without_fit(trained.info.extra),
                "training": json.dumps(training),
                FINGERPRINT: run.identity["base model"],
                "dreamcache_version": __version__,
            },
        )
        adapters = AdapterSet(info)
        adapters.load_state_dict(trained.state_dict())
        self.average.copy_to(adapters)
        return adapters.requires_grad_(False)

    def _save_adapters(self, path: Path) -> None:
        if self.accelerator.is_main_process:
            save_adapters(self._adapters(), path)

    def _save_checkpoint(self) -> None:
        newest = self.run.checkpoints.newest()
        if newest is not None and newest.step == self.step:
            return
        self.accelerator.wait_for_everyone()
        with self.run.checkpoints.new(self.step, self.accelerator) as target:
            self.accelerator.save_state(str(target))
            self._save_adapters(target / ADAPTERS_FILE)
            if self.accelerator.is_main_process:
                self.average.save(target)

    def _validate(self) -> None:
        if self.run.validation is not None:
            try:
                self._draw_grid(self.run.validation)
            except (OSError, RuntimeError, MemoryError) as error:  # torch's is a RuntimeError
                logger.warning(
                    "The grid of step %d could not be drawn (%s: %s); training goes on.",
                    self.step,
                    type(error).__name__,
                    str(error).partition("\n")[0],
                )
        self.accelerator.wait_for_everyone()

    def _draw_grid(self, validation: Validation) -> None:
        total = validation.num_images
        with tqdm(total=total, desc=f"grid of step {self.step}", unit="image", leave=False) as bar:

            def after_image() -> None:
                bar.update(1)
                if self.interruption.is_requested:
                    raise GridSkippedError

            try:
                sheet = validation.save(
                    self._adapters(), self.run.folder / "validation", self.step, after_image
                )
            except GridSkippedError:
                return
        for tracker in self.accelerator.trackers:
            tracker.log_images({"validation": sheet.permute(0, 3, 1, 2)}, step=self.step)


class GridSkippedError(Exception):
    """A grid is not drawn to its end, as the run was asked to stop."""


class Meter:
    """What a run tells while it goes on: progress bar, log, trackers."""

    def __init__(self, run: Run, first_step: int) -> None:
        self.run, self.log_file = run, run.folder / LOG_FILE
        self.bar = tqdm(
            total=run.config.steps,
            initial=first_step,
            unit="step",
            desc="training",
            disable=not run.accelerator.is_main_process,
        )
        self.losses: list[float] = []
        self.busy_s, self.since = 0.0, time.perf_counter()

    def resume(self) -> None:
        """Begin to time a step: what was done since the last one (validation, checkpoint) is left out."""
        self.since = time.perf_counter()

    def count(self, step: int, taken: TakenStep) -> None:
        """Take in a step; every so many, write an entry."""
        config, accelerator = self.run.config, self.run.accelerator
        self.losses.append(taken.loss)
        self.busy_s += time.perf_counter() - self.since
        self.bar.update(1)
        if step % config.log_every and step != config.steps:
            return
        values = {
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": taken.learning_rate,
            "gradient_norm": taken.gradient_norm,
            "images_per_s": len(self.losses) * self.run.global_batch / self.busy_s,
        }
        self.losses, self.busy_s = [], 0.0
        self.bar.set_postfix_str("loss {loss:.4f}, {images_per_s:.2f} images/s".format(**values))
        if accelerator.is_main_process:
            try:
                append_lines(self.log_file, [{"step": step, **values}])
            except OSError as error:
                logger.warning("The log cannot be written: %s.", error)
        accelerator.log(values, step=step)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
