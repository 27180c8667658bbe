"""A ComfyUI model as training calls it: frozen, differentiable, and afterwards as it was."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import EPS, V_PREDICTION, ModelSamplingDiscrete
from comfy.sampler_helpers import convert_cond
from comfy.samplers import cond_cat, encode_model_conds
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ....dreamcache_core import AdapterSet, InputError, StateError, UnsupportedModelError
from ....dreamcache_core.fitting.fit import DEFAULTS, FitSettings, fit_adapters
from ....dreamcache_core.fitting.noise_schedule import NUM_TIMESTEPS, NoiseSchedule
from ....dreamcache_core.method.compiling import plain_module
from ....dreamcache_core.method.layers import Layout
from ..sampling import LoadedModel, bypass_loras

PREDICTION_OF = {
    EPS.calculate_denoised: "epsilon",
    V_PREDICTION.calculate_denoised: "v_prediction",
}
"""What a model predicts, by how its ``model_sampling`` makes a denoised latent of it."""


def noise_schedule(model: ModelPatcher) -> NoiseSchedule:
    """Read a MODEL's noise levels and what it predicts, as its ``model_sampling`` has them.

    Args:
        model: The MODEL; a ModelSamplingDiscrete node before it counts.

    Returns:
        The schedule, on the CPU, usable by autograd.

    Raises:
        InputError: It predicts neither noise nor v (LCM, EDM).
        UnsupportedModelError: It has other than 1000 discrete timesteps.
    """
    sampling = model.get_model_object("model_sampling")
    is_discrete = isinstance(sampling, ModelSamplingDiscrete)
    if not is_discrete or len(sampling.sigmas) != NUM_TIMESTEPS:
        raise UnsupportedModelError(
            f"DreamCache trains on models with Stable Diffusion's {NUM_TIMESTEPS} discrete timesteps; this one has "
            f"{type(sampling).__name__}. Connect a Stable Diffusion 1.x, 2.x or SDXL model, without LCM or the like."
        )
    predicted = type(sampling).calculate_denoised
    kind = PREDICTION_OF.get(predicted) or predicted.__qualname__.split(".")[0]
    with torch.inference_mode(False):
        return NoiseSchedule(1 / (sampling.sigmas.cpu().float() ** 2 + 1), kind)


def check_texts(texts: Sequence[list[Any]], layout: Layout) -> None:
    """Refuse texts that were not encoded for a model.

    Args:
        texts: CONDITIONINGs of one text each.
        layout: The model's layout.

    Raises:
        InputError: The text states have another width, or SDXL's pooled ones are missing.
    """
    width = layout.context_width
    widths = {states.shape[-1] for ((states, _),) in texts}
    if widths != {width}:
        raise InputError(
            f"The model takes text states of width {width}, the CLIP or the conditioning gave "
            f"{', '.join(map(str, sorted(widths)))}. Connect the CLIP of this model."
        )
    has_pooled = all(options.get("pooled_output") is not None for ((_, options),) in texts)
    if layout.family == "sdxl" and not has_pooled:
        raise InputError(
            "SDXL takes a pooled text state (pooled_output) with every text; the CLIP or the conditioning gave a text "
            "without one. Encode the captions with the CLIP of this model, and change nothing in the conditioning."
        )


def wholly_loaded(model: ModelPatcher) -> ModelPatcher:
    """Return a MODEL whose weights stay where they are from forward to backward.

    With dynamic VRAM they are cast at each use, and their memory may serve others before backward reads them.

    Args:
        model: The MODEL.

    Returns:
        The MODEL itself where nothing is dynamic; else a clone with weights of its own, read again from its file.

    Raises:
        StateError: What has loaded the MODEL does not say how to read it again, or it has LoRAs in bypass mode, which belong to
            the weights that are there.
    """
    if not getattr(model, "is_dynamic", bool)():  # ComfyUI before 0.16 has none
        return model
    if model.cached_patcher_init is None:
        raise StateError(
            "Training needs all weights of the model in memory, and the node that loaded this one cannot load it so while "
            "dynamic VRAM is on. Load the model with Load Checkpoint or Load Diffusion Model, or start ComfyUI with "
            "--disable-dynamic-vram."
        )
    if bypass_loras(model):
        raise StateError(
            "While dynamic VRAM is on, training cannot see LoRAs in bypass mode. Load them with Load LoRA, or start ComfyUI with "
            "--disable-dynamic-vram."
        )
    clone = model.clone(disable_dynamic=True)
    # its Linear layers have taken over the float type of the file, in which nothing else computes
    for layer in clone.model.diffusion_model.modules():
        for name, weight in layer.named_parameters(recurse=False):
            weight.data = weight.data.to(dtype=getattr(layer, f"{name}_comfy_model_dtype", None))
    return clone


class FrozenModel:
    """ComfyUI's BaseModel, called row by row with texts of one's choice.

    Args:
        loaded: The model.
        texts: CONDITIONINGs of one text each.
        schedule: Its noise levels.
    """

    def __init__(
        self, loaded: LoadedModel, texts: Sequence[list[Any]], schedule: NoiseSchedule
    ) -> None:
        self.model, self.device = loaded.base, loaded.device
        self.texts, self.schedule = texts, schedule
        self.options = {
            **loaded.transformer_options,
            # not every kernel that users choose for speed has a gradient
            "optimized_attention_override": _differentiable_attention,
        }
        self.unet: Any = plain_module(self.model.diffusion_model)
        self._conds: dict[tuple[int, int, int], dict[str, Any]] = {}

    def predict(
        self, latent: Tensor, noise: Tensor, timesteps: Tensor, texts: Sequence[int]
    ) -> Tensor:
        """Noise latents and let the U-Net predict.

        Args:
            latent: Scaled latents, (batch, channels, height, width).
            noise: Unit noise, same shape.
            timesteps: Training index of each row, int64 (batch,).
            texts: Index of each row's text.

        Returns:
            Predicted noise or v, as the schedule says, same shape, float32.
        """
        abar = self.schedule.alphas_cumprod.to(self.device)[timesteps]
        sigma = ((1 - abar) / abar).sqrt()
        wide = sigma[:, None, None, None]
        x = latent + wide * noise  # ComfyUI scales x down itself
        options = {**self.options, "sigmas": sigma, "cond_or_uncond": [0]}
        conds = cond_cat([self._conds_of(text, latent) for text in texts])
        denoised = self.model.apply_model(x, sigma, transformer_options=options, **conds)
        if self.schedule.prediction == "epsilon":
            return (x - denoised) / wide
        return (x / (wide**2 + 1) - denoised) * (wide**2 + 1).sqrt() / wide

    def fit(
        self,
        layout: Layout,
        shape: tuple[int, int, int],
        text: int,
        *,
        settings: FitSettings = DEFAULTS,
        seed: int,
        on_pass: Callable[[], Any],
    ) -> AdapterSet:
        """Fit adapters, see ``fit_adapters``; ComfyUI interrupts between passes.

        Args:
            layout: Layers to adapt, and the model's other widths.
            shape: Channels, height and width of the latents to draw.
            text: Index of the empty prompt.
            settings: Numbers of the adapters.
            seed: Decides everything; the global random state is left alone.
            on_pass: Called after each pass.

        Returns:
            The adapters, float32 on the CPU.
        """

        def predict(latent: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            on_device = (tensor.to(self.device) for tensor in (latent, noise, timesteps))
            return self.predict(*on_device, texts=[text])

        def after_pass() -> None:
            on_pass()
            comfy.model_management.throw_exception_if_processing_interrupted()

        return fit_adapters(
            self.unet,
            predict,
            self.schedule,
            layout,
            shape,
            settings=settings,
            seed=seed,
            on_pass=after_pass,
        )

    def _conds_of(self, text: int, latent: Tensor) -> dict[str, Any]:
        """What ComfyUI makes of a text for latents of a size: text states; for SDXL pooled ones and sizes too."""
        key = (text, latent.shape[-2], latent.shape[-1])
        if key not in self._conds:
            blank = torch.zeros_like(latent[:1])
            (cond,) = encode_model_conds(
                self.model.extra_conds,
                convert_cond(self.texts[text]),
                blank,
                self.device,
                "positive",
                latent_image=blank,
                denoise_mask=None,
                seed=0,
            )
            self._conds[key] = {
                name: value.process_cond(batch_size=1, area=None)
                for name, value in cond["model_conds"].items()
            }
        return self._conds[key]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze a module and make its weights usable by autograd, inside the context only.

    ComfyUI loads weights in inference mode, and such tensors cannot be saved for backward. Inside the context plain
    tensors on the same memory stand in their place: nothing is copied.

    Args:
        module: Its parameters and buffers.
    """
    stores: list[dict[str, Any]] = [
        store for part in module.modules() for store in (part._parameters, part._buffers)
    ]
    before = [dict(store) for store in stores]
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None and tensor.is_inference():
                    alias = _normal_alias(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    store[name] = nn.Parameter(alias, False) if is_parameter else alias
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        for store, tensors in zip(stores, before, strict=True):
            store.update(tensors)
        for parameter in trainable:
            if not parameter.is_inference():
                parameter.requires_grad_(True)


def _normal_alias(tensor: Tensor) -> Tensor:
    normal = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    storage = tensor.untyped_storage()
    return normal.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


@contextmanager
def frozen_loras(unet: nn.Module) -> Iterator[None]:
    """Make LoRAs in bypass mode usable by autograd, inside the context only; see ``frozen``.

    Args:
        unet: A U-Net whose modules ComfyUI has given a forward that adds a LoRA.
    """
    hooks = [getattr(vars(part).get("forward"), "__self__", None) for part in unet.modules()]
    loras = {id(hook.adapter): hook.adapter for hook in hooks if hasattr(hook, "adapter")}.values()
    before = [lora.weights for lora in loras]
    try:
        for lora in loras:
            lora.weights = [
                _normal_alias(w) if isinstance(w, Tensor) and w.is_inference() else w
                for w in lora.weights
            ]
        yield
    finally:
        for lora, weights in zip(loras, before, strict=True):
            lora.weights = weights


@contextmanager
def checkpointed(unet: Any) -> Iterator[None]:
    """Let backward compute the activations of the middle and the decoder again instead of keeping them.

    Args:
        unet: An ldm-style ``UNetModel``.
    """
    blocks = (unet.middle_block, *unet.output_blocks)
    layers = [layer for block in blocks for layer in block]
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _differentiable_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)
