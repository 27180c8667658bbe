"""Training of adapters: optimizer steps where a sampler would take sampling steps.

Source: METHOD.md section 7.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....dreamcache_core import AdapterSet, ReferenceCache, ReferenceUse, capture_features, inject
from ....dreamcache_core.data.order import SampleOrder, sample_seed
from ....dreamcache_core.fitting.fit import draw_latent
from ....dreamcache_core.fitting.noise_schedule import NUM_TIMESTEPS, NoiseSchedule
from ....dreamcache_core.training.initialisation import FITS
from ....dreamcache_core.training.objective import MIN_TIMESTEP, denoising_loss
from ..model import compute_dtype
from ..sampling import LoadedModel, clean_clone, inside_sampling
from .frozen_model import (
    FrozenModel,
    checkpointed,
    frozen,
    frozen_loras,
    noise_schedule,
    wholly_loaded,
)
from .images import EMPTY_TEXT, TrainingSet

MAX_GRAD_NORM = 1.0
SAMPLE_CFG = 5.0
SAMPLES_AFTER, SAMPLE_EVERY = (0, 50, 100), 250
"""Steps after which an image is drawn, in runs that reach the second of them; and beyond, every so many."""

AfterStep = Callable[[float, int], None]
ShowSample = Callable[[Sequence[Tensor]], None]


class DivergedError(Exception):
    """The loss is not finite any more; the adapters are back at the weights of the last finite one.

    Args:
        num_updates: Updates that they hold.
    """

    def __init__(self, num_updates: int) -> None:
        super().__init__(f"{num_updates} updates")
        self.num_updates = num_updates


@dataclass(frozen=True)
class TrainSettings:
    """How the loop trains.

    Attributes:
        steps: Optimizer steps.
        batch_size: Images of a step.
        learning_rate: Of AdamW, constant.
        seed: Seed of the order, noise levels, noise and dropped captions.
        caption_dropout: Share of samples with the empty prompt.
        gradient_checkpointing: Compute the decoder's activations twice instead of keeping them.
        init: What the adapters start from; what is fitted to the model is given to them here, all else they have.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    caption_dropout: float
    gradient_checkpointing: bool
    init: str


def train(
    model: ModelPatcher,
    adapters: AdapterSet,
    data: TrainingSet,
    settings: TrainSettings,
    after_step: AfterStep,
    after_pass: Callable[[], Any],
    show_sample: ShowSample,
) -> None:
    """Train adapters in place.

    Args:
        model: The MODEL, left as it is; LoRAs count, patches of other packs do not.
        adapters: The adapters, float32, outside inference mode. They are on the CPU again afterwards, whatever happens, as
            the last complete step left them.
        data: The training set, made for this model.
        settings: How to train.
        after_step: Called after each step with its loss and the number of updates that the adapters hold by then, which
            half precision makes fewer than steps where gradients overflow; may raise to end the training.
        after_pass: Called after each pass that fits the start.
        show_sample: Called now and then with scaled latents, (1, channels, height, width): a reference, what the plain model draws
            for its caption, and what it draws from the same noise with the reference.

    Raises:
        DivergedError: The loss became NaN or infinite.
        StateError: The weights are moved in and out of the GPU as they are used, and cannot be loaded as a whole.
    """
    clean = clean_clone(wholly_loaded(model), keep_sampling=True)
    # all of the U-Net and nothing else on the device: no sampling run needs as much room
    comfy.model_management.load_models_gpu([clean], memory_required=1e20, force_full_load=True)
    training = _Training(
        adapters, noise_schedule(model), data, settings, after_step, after_pass, show_sample
    )
    blank = torch.zeros_like(data.targets[0])
    text = data.texts[EMPTY_TEXT]
    try:
        inside_sampling(
            clean,
            text,
            blank,
            training.run,
            noise=blank,
            sigma=torch.ones(1),
            seed=settings.seed,
        )
    finally:
        with torch.inference_mode(False):
            adapters.requires_grad_(False).zero_grad()
            adapters.cpu()


class _Training:
    """What runs inside ComfyUI's sampling."""

    def __init__(
        self,
        adapters: AdapterSet,
        schedule: NoiseSchedule,
        data: TrainingSet,
        settings: TrainSettings,
        after_step: AfterStep,
        after_pass: Callable[[], Any],
        show_sample: ShowSample,
    ) -> None:
        self.adapters, self.schedule, self.data = adapters, schedule, data
        self.settings, self.after_step, self.after_pass = settings, after_step, after_pass
        self.show_sample = show_sample
        self._plain: Tensor | None = None
        sizes = [tuple(target.shape[-2:]) for target in data.targets]
        numbers = {size: number for number, size in enumerate(dict.fromkeys(sizes))}
        buckets = [numbers[size] for size in sizes] if len(numbers) > 1 else None
        self.order = SampleOrder(
            len(data), settings.seed, buckets=buckets, group=settings.batch_size
        )

    def run(self, loaded: LoadedModel) -> None:
        """Train."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(frozen(loaded.base))
            stack.enter_context(frozen_loras(loaded.base.diffusion_model))
            base = FrozenModel(loaded, self.data.texts, self.schedule)
            if self.settings.gradient_checkpointing:
                stack.enter_context(checkpointed(base.unet))
            self.adapters.to(base.device).requires_grad_(True)
            if self.settings.init in FITS:
                self.fit(base)
            self.optimise(base)

    def fit(self, base: FrozenModel) -> None:
        """Start from adapters fitted to the model."""
        info = self.adapters.info
        channels, height, width = self.data.references[0][0].shape[1:]
        fitted = base.fit(
            info.layout,
            (channels, height, width),
            EMPTY_TEXT,
            settings=replace(FITS[self.settings.init], timestep=info.timestep),
            seed=self.settings.seed,
            on_pass=self.after_pass,
        )
        self.adapters.load_state_dict(fitted.state_dict())

    def optimise(self, base: FrozenModel) -> None:
        """Take the optimizer steps."""
        parameters = list(self.adapters.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=self.settings.learning_rate)
        # half-precision gradients of the frozen layers underflow without
        has_half = compute_dtype(base.model.current_patcher) == torch.float16
        scaler = torch.amp.GradScaler(base.device.type, enabled=has_half)
        good = [parameter.detach().clone() for parameter in parameters]
        num_updates = num_good = 0
        self.sample(base, 0)
        for step in range(self.settings.steps):
            optimizer.zero_grad()
            loss = self.backward(base, step, scaler)
            if not math.isfinite(loss):
                _copy(good, parameters)
                raise DivergedError(num_good)
            _copy(parameters, good)
            num_good = num_updates
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            # with a scaler an infinite norm is part of how the loss scale is found
            if not has_half and not math.isfinite(float(norm)):
                raise DivergedError(num_good)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            num_updates += scaler.get_scale() >= scale  # it lowers the scale where it skips a step
            self.after_step(loss, num_updates)
            self.sample(base, step + 1)

    @torch.no_grad()
    def sample(self, base: FrozenModel, step: int) -> None:
        """After some steps, draw the first image of the set from its caption and reference; training is not touched by it."""
        is_due = step in SAMPLES_AFTER or step % SAMPLE_EVERY == 0
        if not is_due or self.settings.steps < SAMPLES_AFTER[1]:
            return
        generator = torch.Generator().manual_seed(self.settings.seed)
        noise = torch.randn(self.data.targets[0].shape, generator=generator)
        reference = self.data.references[0][0].to(base.device)
        reference_noise = torch.randn(reference.shape, generator=generator).to(base.device)
        batch = {
            "reference": reference,
            "reference_noise": reference_noise,
            "timestep": torch.zeros(1, dtype=torch.int64, device=base.device),
        }
        use = ReferenceUse(self.capture(base, batch), self.adapters)

        def predict(latent: Tensor, noise: Tensor, timestep: int) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            latents, noises = (x.repeat(2, 1, 1, 1).to(base.device) for x in (latent, noise))
            timesteps = torch.full((2,), timestep, device=base.device)
            both = base.predict(latents, noises, timesteps, [0, EMPTY_TEXT])
            text, empty = both.cpu().split(1)
            return empty + SAMPLE_CFG * (text - empty)

        if self._plain is None:
            self._plain = draw_latent(predict, self.schedule, noise)
        with inject(base.unet, use):
            drawn = draw_latent(predict, self.schedule, noise)
        self.show_sample([base.model.process_latent_in(reference).cpu(), self._plain, drawn])

    def backward(self, base: FrozenModel, step: int, scaler: Any) -> float:
        """Compute one batch's loss and gradients."""
        batch, texts = self.draw_batch(base, step)
        use = ReferenceUse(self.capture(base, batch), self.adapters, per_row=True)
        latent, timesteps = base.model.process_latent_in(batch["target"]), batch["timestep"]
        weights = self.schedule.weights(timesteps, None)
        with inject(base.unet, use):  # open until after backward: checkpointing runs blocks again
            prediction = base.predict(latent, batch["noise"], timesteps, texts)
            target = self.schedule.target(latent, batch["noise"], timesteps)
            loss = denoising_loss(prediction, target, weights)
            if math.isfinite(value := float(loss.detach())):
                scaler.scale(loss).backward()
        return value

    @torch.no_grad()
    def capture(self, base: FrozenModel, batch: dict[str, Tensor]) -> ReferenceCache:
        """Cache the references of a batch in one pass that ends at the last cached layer."""
        info, (rows, columns) = self.adapters.info, batch["reference"].shape[-2:]
        latent = base.model.process_latent_in(batch["reference"])
        timesteps = torch.full_like(batch["timestep"], info.timestep)
        with capture_features(base.unet, self.adapters.layers, stop_early=True) as features:
            base.predict(latent, batch["reference_noise"], timesteps, [EMPTY_TEXT] * len(latent))
        return ReferenceCache(features, info.layout.context_width, (rows, columns), info.timestep)

    def draw_batch(self, base: FrozenModel, step: int) -> tuple[dict[str, Tensor], list[int]]:
        """Draw the samples of a step: their tensors by name, on the model's device, and their texts."""
        size = self.settings.batch_size
        drawn = [self.draw(position) for position in range(step * size, (step + 1) * size)]
        samples = [sample for sample, _ in drawn]
        batch = {
            name: torch.cat([sample[name] for sample in samples]).to(base.device)
            for name in samples[0]
        }
        return batch, [text for _, text in drawn]

    def draw(self, position: int) -> tuple[dict[str, Tensor], int]:
        """Draw the sample at a position of the run, everything random from the position's own seed."""
        epoch, index = self.order(position)
        generator = torch.Generator().manual_seed(sample_seed(self.settings.seed, position))
        timestep = torch.randint(MIN_TIMESTEP, NUM_TIMESTEPS, (1,), generator=generator)
        is_dropped = bool(torch.rand((), generator=generator) < self.settings.caption_dropout)
        target, variants = self.data.targets[index], self.data.references[index]
        reference = variants[epoch % len(variants)]
        sample = {
            "target": target,
            "noise": torch.randn(target.shape, generator=generator),
            "reference": reference,
            "reference_noise": torch.randn(reference.shape, generator=generator),
            "timestep": timestep,
        }
        return sample, EMPTY_TEXT if is_dropped else index


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for given, taken in zip(source, target, strict=True):
        taken.copy_(given)
