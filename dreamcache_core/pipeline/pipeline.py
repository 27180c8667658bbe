"""``DreamCachePipeline``: the method around a loaded diffusers pipeline. diffusers is imported on first use."""

import dataclasses
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedModelError
from ..method.adapter import AdapterModules
from ..method.backends import layout_of
from ..method.blending import ReferenceUse
from ..method.cache import ReferenceCache
from ..method.capture import capture_reference, subject_tokens
from ..method.guidance import (
    Guidance,
    GuidanceMode,
    Prediction,
    combine_guidance,
    needed_predictions,
)
from ..method.injection import inject, prepare_for_compile
from .arguments import (
    Generators,
    OutputType,
    check_generators,
    check_images,
    check_regions,
    check_settings,
    cpu_generator,
    list_of_prompts,
    list_of_uses,
)
from .fused import FusedAdapters
from .latents import LatentCodec
from .loading import is_sdxl, require_diffusers
from .sampling import Rows, Text

logger = logging.getLogger(__name__)

Callback = Callable[[int, int, Tensor], None]


class DreamCachePipeline:
    """Personalised images with a loaded ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.

    The pipeline stays the caller's: its modules, scheduler and options are used as they are and left as they were.

    Args:
        pipeline: The diffusers pipeline; components may be shared with other pipelines.

    Raises:
        MissingPackageError: diffusers or transformers is not installed.
        UnsupportedModelError: The pipeline is of another kind.
    """

    def __init__(self, pipeline: Any) -> None:
        require_diffusers()
        self.is_sdxl = is_sdxl(pipeline)
        self.layout = layout_of(pipeline.unet)
        self.pipeline = pipeline
        self.codec = LatentCodec(pipeline)
        self._fused = FusedAdapters()
        self._checked: WeakSet[AdapterModules] = WeakSet()

    @property
    def device(self) -> torch.device:
        """Where the models compute; under CPU offloading that is not where they rest."""
        return self.pipeline._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """Float type that the U-Net computes in."""
        return self.pipeline.unet.dtype

    @property
    def default_size_px(self) -> tuple[int, int]:
        """Height and width that the model was trained for."""
        sample = self.pipeline.unet.config.sample_size
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    def compile(self, layers: Sequence[str] | None = None, **options: Any) -> None:
        """Compile the U-Net in place; references may change afterwards without compiling anew.

        Images of another size, or another number of images or of reference images, are compiled once more each.

        Args:
            layers: Layers of the adapters that will be used; ``None`` takes METHOD.md's rule.
            options: Of ``torch.compile``: ``mode="max-autotune"``, ``backend``, ...

        Raises:
            StateError: The U-Net is compiled already.
        """
        prepare_for_compile(self.pipeline.unet, layers)
        self.pipeline.unet.compile(**options)

    @torch.no_grad()
    def encode_reference(
        self,
        image: Tensor,
        *,
        mask: Tensor | None = None,
        prompt: str = "",
        seed: int = 0,
        timestep: int = 1,
        layers: Sequence[str] | None = None,
    ) -> ReferenceCache:
        """Turn prepared images of one subject into a reference, each by its own passes.

        Source: METHOD.md section 3. The latent is the mode of the VAE's distribution, not a sample of it, so that the
        same image gives the same latent; every image gets the same noise, drawn on the CPU from ``seed``, so
        that its features do not depend on what is encoded with it. The global random state is left alone.

        Args:
            image: Images as ``prepare_reference_image`` returns them, (references, height, width, 3) in [0, 1];
                sides are multiples of 8.
            mask: (1 or references, height, width) in [0, 1], 1 = subject: of the background only averages are attended
                to (``keep_tokens``). ``None``, as in training: all tokens.
            prompt: Text of the pass; empty in training.
            seed: Seed of the noise.
            timestep: Training index of the pass, 0 to 999; 1 in the paper.
            layers: Canonical names of the layers to cache, those of the adapters; ``None`` takes METHOD.md's rule.

        Returns:
            The cache, on the CPU.

        Raises:
            InputError: An image, the mask or the timestep is unfit.
            UnsupportedModelError: The scheduler has no table of noise levels (flow matching).
        """
        check_images(image, mask, self.pipeline.vae_scale_factor)
        alpha = self._alpha(timestep)
        noise = torch.randn(self._latent_shape(image), generator=cpu_generator(seed))
        # METHOD.md section 3, point 3: x_1 = sqrt(abar_1) * z + sqrt(1 - abar_1) * noise
        noised = [
            alpha.sqrt() * self.codec.encode(image[i : i + 1]).float().cpu()
            + (1 - alpha).sqrt() * noise
            for i in range(len(image))
        ]
        text = self.encode_text([prompt])
        height, width = image.shape[1:3]
        cache = capture_reference(
            self.pipeline.unet,
            torch.cat(noised).to(self.device, self.dtype),
            timestep,
            text.states,
            unet_kwargs=self.conditions(text, height, width),
            seed=seed,
            layers=layers,
        )
        self.pipeline.maybe_free_model_hooks()
        return cache if mask is None else _with_masks(cache, mask)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        uses: ReferenceUse | Sequence[ReferenceUse],
        negative_prompt: str | Sequence[str] = "",
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 0.4,
        num_inference_steps: int = 50,
        generator: Generators = None,
        guidance: GuidanceMode = "separate",
        image_range: tuple[float, float] = (0.0, 1.0),
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        callback: Callback | None = None,
        output_type: OutputType = "pil",
    ) -> Any:
        """Generate images of the subject.

        Source: METHOD.md sections 4 and 5. One U-Net call per step over all needed predictions; keys and values of the
        references are computed once per call. Where no use is active this is ordinary classifier-free guidance.

        Args:
            prompt: What to show; several prompts give a batch.
            uses: References with their adapters, one or several. Unfused adapters are fused once per adapter set, to
                the U-Net's float type and device.
            negative_prompt: One for all prompts, or one each.
            guidance_scale: s_text, unitless; 7.5 in the paper.
            image_guidance_scale: s_image, unitless; 0.4 in the paper.
            num_inference_steps: Steps of the pipeline's scheduler.
            generator: One random generator, or one per image: then an image does not depend on the batch size.
                ``None`` uses the global random state.
            guidance: ``separate`` (three-term rule) or ``joint``; see ``Guidance``.
            image_range: Part of the run in which ``image_guidance_scale`` holds; outside it is 1, and steps are a third
                cheaper. See ``Guidance``.
            height: Of the new images in pixels, a multiple of 8; ``None``: that of ``latents``, else the model's own.
            width: Likewise.
            num_images_per_prompt: Images for each prompt.
            latents: Start noise of unit variance, (images, channels, height / 8, width / 8); ``None``: drawn.
            callback: Called after every step with the step's index, the timestep and the latents.
            output_type: ``pil``, ``pt`` or ``latent``.

        Returns:
            ``pil``: a list of images; ``pt``: (images, 3, height, width), float in [0, 1]; ``latent``: scaled latents,
            (images, channels, height / 8, width / 8). Image r of prompt p is at p * num_images_per_prompt + r.

        Raises:
            InputError: An argument is out of range, or the result is not finite.
            MismatchError: A reference or its adapters were made for another model.
        """
        rule = Guidance(
            image_guidance_scale=image_guidance_scale, mode=guidance, image_range=image_range
        )
        check_settings(guidance_scale, num_images_per_prompt, output_type)
        self._check_steps(num_inference_steps)
        given = list_of_uses(uses)
        for use in given:
            self._warn_of_prediction(use.adapters)
        ready = [self._fused.ready(use, device=self.device, dtype=self.dtype) for use in given]
        if not any(use.is_active for use in ready):
            # without an active reference, joint guidance is ordinary classifier-free guidance
            rule = Guidance(mode="joint")
        wanted = needed_predictions(rule, guidance_scale)
        batch = self._make_batch(prompt, negative_prompt, wanted, num_images_per_prompt)
        check_regions(ready, batch.num_images)
        generators = check_generators(generator, batch.num_images)
        noise = self._start(latents, (height, width), generators, batch)
        self.pipeline.scheduler.set_timesteps(num_inference_steps, device=self.device)
        result = self._denoise(
            noise,
            batch,
            ready,
            rule=rule,
            guidance_scale=guidance_scale,
            step_options=self._step_options(generators),
            callback=callback,
        )
        images = self._finish(result, output_type)
        self.pipeline.maybe_free_model_hooks()
        return images

    def _denoise(
        self,
        latents: Tensor,
        batch: Rows,
        uses: Sequence[ReferenceUse],
        *,
        rule: Guidance,
        guidance_scale: float,
        step_options: dict[str, Any],
        callback: Callback | None,
    ) -> Tensor:
        """Run the scheduler's steps from unit noise -> latents."""
        unet, scheduler = self.pipeline.unet, self.pipeline.scheduler
        factor = self.pipeline.vae_scale_factor
        height, width = latents.shape[-2] * factor, latents.shape[-1] * factor
        progress = 1 - scheduler.timesteps.cpu().double() / (
            scheduler.config.num_train_timesteps - 1
        )
        parts = {count: batch.last(count) for count in range(1, len(batch.predictions) + 1)}
        conditions = {n: self.conditions(part.text, height, width) for n, part in parts.items()}
        num_terms = 0
        latents = latents * scheduler.init_noise_sigma
        with inject(unet, uses) as injection:
            for index, timestep in enumerate(scheduler.timesteps):
                at_step = rule.at(float(progress[index]))
                if num_terms != (wanted := len(needed_predictions(at_step, guidance_scale))):
                    num_terms = wanted
                    injection.choose_rows(parts[num_terms].see_references)
                scaled = scheduler.scale_model_input(latents, timestep)
                output = unet(
                    scaled.repeat(num_terms, 1, 1, 1),
                    timestep,
                    encoder_hidden_states=parts[num_terms].text.states,
                    return_dict=False,
                    **conditions[num_terms],
                )[0]
                guided = _combine(
                    output.chunk(num_terms), guidance_scale, rule.image_guidance_scale
                )
                latents = scheduler.step(
                    guided, timestep, latents, return_dict=False, **step_options
                )[0]
                if callback is not None:
                    callback(index, int(timestep), latents)
        return latents

    def _make_batch(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str],
        wanted: tuple[Prediction, ...],
        num_images_per_prompt: int,
    ) -> Rows:
        prompts, negatives = list_of_prompts(prompt, negative_prompt)
        positive = self.encode_text(prompts).repeat_each(num_images_per_prompt)
        texts = [positive]
        if len(wanted) > 1:
            negative = self.encode_text(negatives).repeat_each(num_images_per_prompt)
            texts = [negative] * (len(wanted) - 1) + texts
        return Rows(wanted, Text.join(texts), len(prompts) * num_images_per_prompt)

    def encode_text(self, prompts: list[str]) -> Text:
        """Encode prompts with the pipeline's text encoders.

        Args:
            prompts: What is beyond the encoders' limit is cut off.

        Returns:
            A row for each prompt, on the device and in the float type of the U-Net.
        """
        encoded = self.pipeline.encode_prompt(
            prompt=prompts,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        pooled = encoded[2].to(self.device, self.dtype) if self.is_sdxl else None
        return Text(encoded[0].to(self.device, self.dtype), pooled)

    def conditions(self, text: Text, height: int, width: int) -> dict[str, Any]:
        """Further arguments of the U-Net: SDXL's pooled text and time ids (METHOD.md section 3).

        Args:
            text: Encoded prompts of the rows.
            height: Of the image, pixels.
            width: Likewise.

        Returns:
            Keyword arguments; none for Stable Diffusion 1.x and 2.x.
        """
        if text.pooled is None:
            return {}
        ids = [height, width, 0, 0, height, width]
        time_ids = torch.tensor([ids] * len(text.pooled), device=self.device, dtype=self.dtype)
        return {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": time_ids}}

    def _start(
        self,
        latents: Tensor | None,
        size: tuple[int | None, int | None],
        generators: Generators,
        batch: Rows,
    ) -> Tensor:
        """Return unit noise of the wanted size, drawn or as given."""
        from diffusers.utils.torch_utils import randn_tensor

        factor = self.pipeline.vae_scale_factor
        height, width = size
        if latents is not None and latents.ndim == 4:
            height = height or latents.shape[-2] * factor
            width = width or latents.shape[-1] * factor
        height, width = height or self.default_size_px[0], width or self.default_size_px[1]
        if min(height, width) < factor or height % factor or width % factor:
            raise InputError(
                f"Expected height and width to be multiples of {factor} pixels; given {height} x {width}."
            )
        channels = self.pipeline.unet.config.in_channels
        shape = (batch.num_images, channels, height // factor, width // factor)
        if latents is None:
            return randn_tensor(shape, generators, device=self.device, dtype=self.dtype)  # pyright: ignore[reportArgumentType]
        if tuple(latents.shape) != shape:
            raise InputError(
                f"Expected latents of {shape} for {batch.num_images} images of {height} x {width} pixels (height x "
                f"width); given {tuple(latents.shape)}."
            )
        return latents.to(self.device, self.dtype)

    def _step_options(self, generators: Generators) -> dict[str, Any]:
        accepted = inspect.signature(self.pipeline.scheduler.step).parameters
        return {"generator": generators} if "generator" in accepted else {}

    def _warn_of_prediction(self, adapters: AdapterModules) -> None:
        if adapters in self._checked:
            return
        self._checked.add(adapters)
        scheduler = self.pipeline.scheduler.config
        predicted = getattr(scheduler, "prediction_type", "epsilon")
        if predicted != adapters.info.prediction:
            logger.warning(
                "This model predicts %s, the adapters were trained on one that predicts %s (for SD 2.1: on 2.1-base, "
                "not on a 768-v checkpoint): expect a weaker likeness. Use the base model of the adapters.",
                predicted,
                adapters.info.prediction,
            )

    def _check_steps(self, steps: int) -> None:
        most = self.pipeline.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise InputError(f"num_inference_steps must be in 1 ... {most}; given {steps}.")

    def _alpha(self, timestep: int) -> Tensor:
        """Cumulated signal power at a training index, a float32 scalar on the CPU."""
        alphas = getattr(self.pipeline.scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise UnsupportedModelError(
                f"Expected a scheduler with alphas_cumprod; {type(self.pipeline.scheduler).__name__} has none. Use one "
                "of Stable Diffusion's, DDIMScheduler say."
            )
        if not 0 <= timestep < len(alphas):
            raise InputError(f"timestep must be in 0 ... {len(alphas) - 1}; given {timestep}.")
        return alphas[timestep].float().cpu()

    def _latent_shape(self, image: Tensor) -> tuple[int, int, int, int]:
        factor = self.pipeline.vae_scale_factor
        channels = self.pipeline.vae.config.latent_channels
        return 1, channels, image.shape[1] // factor, image.shape[2] // factor

    def _finish(self, latents: Tensor, output_type: OutputType) -> Any:
        if not bool(latents.isfinite().all()):
            raise InputError(_NOT_FINITE.format("The latents", "Load the model in float32."))
        if output_type == "latent":
            return latents
        decoded = self.codec.decode(latents)
        if not bool(decoded.isfinite().all()):
            raise InputError(_NOT_FINITE.format("The decoded images", "Load the VAE in float32."))
        return self.pipeline.image_processor.postprocess(decoded, output_type=output_type)


_NOT_FINITE = "{} hold NaN or infinity, so there is no image to show: an overflow, by extreme scales or in half precision. {}"


def _combine(terms: Sequence[Tensor], guidance_scale: float, image_guidance_scale: float) -> Tensor:
    """Combine what ``needed_predictions`` listed; two terms have the form of ordinary guidance."""
    if len(terms) == 1:
        return terms[0]
    if len(terms) == 2:
        return terms[0] + guidance_scale * (terms[1] - terms[0])
    return combine_guidance(
        *terms, guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale
    )


def _with_masks(cache: ReferenceCache, mask: Tensor) -> ReferenceCache:
    mask = mask.expand(cache.num_references, -1, -1)
    tokens = {n: subject_tokens(mask, *f.shape[-2:]) for n, f in cache.features.items()}
    return dataclasses.replace(cache, masks=tokens)
