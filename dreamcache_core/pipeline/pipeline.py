"""``DreamCachePipeline``: the method around a loaded diffusers pipeline. diffusers is imported on first use."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ..errors import InputError, StateError
from ..fitting.fit import fitted_to_another
from ..images.files import ImageFile
from ..images.reference_files import prepare_references, read_references
from ..images.sheets import encode_thumbnails
from ..method.adapter import AdapterModules, AdapterSet
from ..method.adapter_files import load_adapters
from ..method.backends import layout_of, require_fit
from ..method.blending import ReferenceUse
from ..method.cache import ReferenceCache
from ..method.capture import capture_reference
from ..method.guidance import Guidance, GuidanceMode, Prediction, needed_predictions
from ..method.injection import prepare_for_compile
from .arguments import (
    Generators,
    OutputType,
    check_count,
    check_images,
    check_one_or_each,
    check_settings,
    cpu_generator,
    list_of_generators,
    list_of_prompts,
    list_of_uses,
)
from .fused import FusedAdapters
from .latents import LatentCodec
from .loading import is_sdxl, load_pipeline, noise_levels
from .sampling import Callback, Text, denoise

logger = logging.getLogger(__name__)


class DreamCachePipeline:
    """Personalised images with a loaded ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.

    The pipeline stays the caller's: its modules, scheduler and options are used as they are and left as they were.

    Args:
        pipeline: The diffusers pipeline; components may be shared with other pipelines.
        adapters: What ``read_reference`` uses.

    Raises:
        MismatchError: The adapters were made for another model.
        MissingPackageError: diffusers or transformers is not installed.
        UnsupportedModelError: The pipeline is of another kind.
    """

    def __init__(self, pipeline: Any, adapters: AdapterSet | None = None) -> None:
        self.codec = LatentCodec(pipeline)
        self.layout = layout_of(pipeline.unet)
        if adapters is not None:
            require_fit(pipeline.unet, adapters.info.layout, "the adapters are for")
        self.pipeline, self.adapters = pipeline, adapters
        self._fused = FusedAdapters()
        self._checked: WeakSet[AdapterModules] = WeakSet()

    @classmethod
    def from_files(
        cls,
        model: str | os.PathLike[str],
        adapters: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        scheduler: str = "ddim",
    ) -> "DreamCachePipeline":
        """Load a base model and adapters from local files; nothing is downloaded.

        Args:
            model: A diffusers folder, or a single-file checkpoint.
            adapters: An adapter file.
            config: For a single file not of Stable Diffusion 1.x or SDXL: a diffusers folder like it.
            device: ``cuda``, ``cpu``, ...; ``auto``: an accelerator where there is one.
            dtype: ``float16``, ``bfloat16`` or ``float32``; ``auto``: float16 on CUDA and XPU devices.
            scheduler: ``ddim``, as in the paper, or ``model`` for the model's own.

        Returns:
            The pipeline on the device.

        Raises:
            FileFormatError: A file is missing, damaged or something else.
            InputError: There is no such device or float type, or ``config`` is missing.
            MismatchError: The adapters were made for another model.
            MissingPackageError: diffusers or transformers is not installed.
            UnsupportedModelError: The model is of another kind.
        """
        loaded = load_adapters(adapters)
        pipeline = load_pipeline(
            model, config=config, device=device, dtype=dtype, scheduler=scheduler
        )
        if fitted_to_another(pipeline.unet, loaded):
            logger.warning(
                "The adapters were fitted to another model (%s): expect a weaker likeness. Fit them to this one: "
                "dreamcache fit --model %s --out FILE.",
                loaded.info.base_model,
                model,
            )
        return cls(pipeline, loaded)

    @property
    def is_sdxl(self) -> bool:
        """Whether it is SDXL's.

        Raises:
            UnsupportedModelError: The pipeline has since been changed into another kind, by an IP-Adapter say.
        """
        return is_sdxl(self.pipeline)

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

    def read_reference(
        self,
        files: ImageFile | Sequence[ImageFile],
        masks: ImageFile | Sequence[ImageFile] = (),
        *,
        size: int | None = None,
        fill: float = 0.85,
        scale: float = 1.0,
    ) -> ReferenceUse:
        """Turn image files of one subject into what ``__call__`` uses.

        Args:
            files: One image file or several.
            masks: As many masks, white is the subject; none: the images' transparency.
            size: Side of the square that the subject is placed on, pixels; ``None``: the model's own.
            fill: Share of the side that the subject takes.
            scale: Strength, unitless: 0 is exactly the plain model, 1 as trained.

        Returns:
            The reference with the pipeline's adapters.

        Raises:
            FileFormatError: A file is no image, or is damaged.
            InputError: A file is missing, or an image, a mask or a number is unfit.
            StateError: The pipeline was made without adapters.
        """
        references = read_references(_as_list(files), _as_list(masks))
        size = size or min(self.default_size_px)
        return self.use_reference(prepare_references(references, size=size, fill=fill), scale)

    def use_reference(self, image: Tensor, scale: float = 1.0) -> ReferenceUse:
        """Turn prepared images of one subject into what ``__call__`` uses, with the pipeline's adapters.

        Args:
            image: As ``encode_reference`` takes them.
            scale: Strength, unitless: 0 is exactly the plain model, 1 as trained.

        Raises:
            InputError: An image is unfit.
            StateError: The pipeline was made without adapters.
        """
        if self.adapters is None:
            raise StateError(
                "Expected a pipeline with adapters. Make it with DreamCachePipeline.from_files(model, adapters)."
            )
        return ReferenceUse(self.encode_reference(image), self.adapters, scale)

    @torch.no_grad()
    def encode_reference(
        self,
        image: Tensor,
        *,
        mask: Tensor | None = None,
        prompt: str = "",
        seed: int = 0,
        timestep: int | None = None,
        layers: Sequence[str] | None = None,
        adapters: AdapterModules | None = None,
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
            timestep: Training index of the pass, 0 to 999; ``None``: that of ``adapters``, or 1, as in the paper.
            layers: Canonical names of the layers to cache; ``None``: those of ``adapters``, or by METHOD.md's rule.
            adapters: What the reference is for; ``None``: the pipeline's own, if it has any.

        Returns:
            The cache, on the CPU.

        Raises:
            InputError: An image, the mask or the timestep is unfit.
            MismatchError: The U-Net has no layer of that name.
            UnsupportedModelError: The pipeline is of another kind.
        """
        check_images(image, mask, self.pipeline.vae_scale_factor)
        text = self.encode_text([prompt])
        adapters = self.adapters if adapters is None else adapters
        if adapters is not None:
            layers = adapters.layers if layers is None else layers
            timestep = adapters.info.timestep if timestep is None else timestep
        timestep = 1 if timestep is None else timestep
        height, width = image.shape[1:3]
        alpha = self._alpha(timestep)
        noise = torch.randn(self._latent_shape(1, height, width), generator=cpu_generator(seed))
        # METHOD.md section 3, point 3: x_1 = sqrt(abar_1) * z + sqrt(1 - abar_1) * noise
        noised = [
            alpha.sqrt() * self.codec.encode(image[i : i + 1]).float().cpu()
            + (1 - alpha).sqrt() * noise
            for i in range(len(image))
        ]
        cache = capture_reference(
            self.pipeline.unet,
            torch.cat(noised).to(self.device, self.dtype),
            timestep,
            text.states,
            unet_kwargs=text.conditions(height, width),
            seed=seed,
            layers=layers,
            mask=mask,
        )
        self.pipeline.maybe_free_model_hooks()
        return replace(cache, thumbnails=encode_thumbnails(image))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        uses: ReferenceUse | Sequence[ReferenceUse],
        negative_prompt: str | Sequence[str] | None = "",
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.0,
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
            negative_prompt: One for all prompts, or one each; ``None`` is the empty one.
            guidance_scale: s_text, unitless; 7.5 in the paper.
            image_guidance_scale: s_image, unitless; 0.4 in the paper's benchmark, 1 needs one prediction less.
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
        rule = Guidance(image_guidance_scale, guidance, image_range)
        check_settings(guidance_scale, num_inference_steps, self.pipeline.scheduler, output_type)
        check_count("num_images_per_prompt", num_images_per_prompt, 1)
        if callback is not None and not callable(callback):
            raise InputError(f"callback must be a function; given {callback!r}.")
        prompts, negatives = (
            [text for text in texts for _ in range(num_images_per_prompt)]
            for texts in list_of_prompts(prompt, negative_prompt)
        )
        generators = list_of_generators(generator, len(prompts))
        ready = self._ready(uses, len(prompts))
        if not any(use.is_active for use in ready):
            # without an active reference, joint guidance is ordinary classifier-free guidance
            rule = Guidance(mode="joint")
        size_px = self._size(height, width, latents)
        noise = self._noise(latents, len(prompts), size_px, generators)
        texts: dict[Prediction, Text] = {"reference_and_text": self.encode_text(prompts)}
        if len(needed_predictions(rule, guidance_scale)) > 1:
            negative = self.encode_text(negatives)
            texts |= {"unconditional": negative, "reference_only": negative}
        denoised = denoise(
            self.pipeline.unet,
            self.pipeline.scheduler,
            noise,
            texts,
            ready,
            guidance=rule,
            guidance_scale=guidance_scale,
            num_steps=num_inference_steps,
            size_px=size_px,
            generators=generators,
            callback=callback,
        )
        images = self._finish(denoised, output_type)
        self.pipeline.maybe_free_model_hooks()
        return images

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

    def _ready(
        self, uses: ReferenceUse | Sequence[ReferenceUse], num_images: int
    ) -> list[ReferenceUse]:
        """Check uses, and give them adapters that the U-Net can run with."""
        given = list_of_uses(uses)
        for use in given:
            self._warn_of_prediction(use.adapters)
            if use.regions is not None:
                check_one_or_each(use.regions, "region mask", num_images)
        return [self._fused.ready(use, device=self.device, dtype=self.dtype) for use in given]

    def _size(
        self, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int]:
        """Choose height and width of the new images: as given, that of the latents, the model's own."""
        factor, default = self.pipeline.vae_scale_factor, self.default_size_px
        if latents is not None and not isinstance(latents, Tensor):
            raise InputError(f"Expected latents to be a tensor; given {type(latents).__name__}.")
        if latents is not None and latents.ndim == 4:
            default = latents.shape[-2] * factor, latents.shape[-1] * factor
        size = height or default[0], width or default[1]
        for name, side in zip(("height", "width"), size, strict=True):
            check_count(name, side, factor)
        if any(side % factor for side in size):
            raise InputError(
                f"Expected height and width to be multiples of {factor} pixels; given {size[0]} x {size[1]}."
            )
        return size

    def _noise(
        self,
        latents: Tensor | None,
        num_images: int,
        size_px: tuple[int, int],
        generators: Generators,
    ) -> Tensor:
        """Return unit noise, drawn or as given."""
        from diffusers.utils.torch_utils import randn_tensor

        shape = self._latent_shape(num_images, *size_px)
        if latents is None:
            return randn_tensor(shape, generators, device=self.device, dtype=self.dtype)  # pyright: ignore[reportArgumentType]
        if tuple(latents.shape) != shape:
            raise InputError(
                f"Expected latents of {shape} for {num_images} images of {size_px[0]} x {size_px[1]} pixels (height x "
                f"width); given {tuple(latents.shape)}."
            )
        return latents.to(self.device, self.dtype)

    def _latent_shape(self, num_images: int, height: int, width: int) -> tuple[int, int, int, int]:
        factor = self.pipeline.vae_scale_factor
        channels = self.pipeline.unet.config.in_channels
        return num_images, channels, height // factor, width // factor

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

    @property
    def alphas_cumprod(self) -> Tensor:
        """Cumulated signal power at every training index, float32 on the CPU.

        Raises:
            UnsupportedModelError: The scheduler has no table of noise levels (flow matching).
        """
        return noise_levels(self.pipeline.scheduler).float().cpu()

    def _alpha(self, timestep: int) -> Tensor:
        """Cumulated signal power at a training index, a float32 scalar on the CPU."""
        alphas = self.alphas_cumprod
        if not 0 <= timestep < len(alphas):
            raise InputError(f"timestep must be in 0 ... {len(alphas) - 1}; given {timestep}.")
        return alphas[timestep]

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


def _as_list(files: ImageFile | Sequence[ImageFile]) -> Sequence[ImageFile]:
    return [files] if isinstance(files, (str, bytes, os.PathLike)) else files
