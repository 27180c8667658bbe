"""What a run will do and need, told before its first step: its plan, and the memory that its forward pass keeps."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..method.adapter import AdapterSet
from ..method.cache import LATENT_FACTOR
from .injected_unet import InjectedUNet

logger = logging.getLogger(__name__)

MIB = 2**20
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Plan:
    """The plan of a run; sizes in bytes.

    Attributes:
        num_parameters: That learn.
        num_samples: Samples of the training set.
        num_images: The same without repeats.
        resolution: Side of the reference square, pixels.
        folder: Where the run lies.
        first_step: Steps that it has behind it.
        num_steps: Optimizer steps.
        global_batch: Samples of one of them, over all processes.
        num_processes: Processes that train.
        device: What each of them runs on, and in which float type.
        weights: Frozen base model, on each device.
        trained: Adapters, gradients, the optimizer's moments and the average, on each device; a checkpoint
            holds as much, the adapters twice and no gradients.
        activations: Kept between forward and backward pass, on each device.
        num_checkpoints: Kept at a time.
    """

    num_parameters: int
    num_samples: int
    num_images: int
    resolution: int
    folder: Path
    first_step: int
    num_steps: int
    global_batch: int
    num_processes: int
    device: str
    weights: int
    trained: int
    activations: int
    num_checkpoints: int

    @property
    def memory(self) -> int:
        """Memory of a device, without temporary buffers."""
        return self.weights + self.trained + self.activations

    @property
    def disk(self) -> int:
        """Room for all checkpoints and for one that is being written."""
        return self.trained * (self.num_checkpoints + 1)

    def lines(self) -> list[str]:
        """The plan for people."""
        epochs = self.num_steps * self.global_batch / self.num_samples
        per_step = f"{self.global_batch} samples a step on {self.num_processes} process"
        return [
            f"device: {self.device}",
            f"trainable parameters: {self.num_parameters:,}",
            f"samples: {self.num_samples:,}{'' if self.num_images == self.num_samples else f' of {self.num_images:,} images'}, "
            f"{self.resolution} px",
            f"steps: {f'from {self.first_step:,} to ' if self.first_step else ''}{self.num_steps:,} ({per_step}{'es' if self.num_processes > 1 else ''}, {epochs:.1f} epochs)",
            f"memory of each device: about {self.memory / MIB:,.0f} MiB (base model {self.weights / MIB:,.0f}, adapters "
            f"with gradients and optimizer {self.trained / MIB:,.0f}, activations {self.activations / MIB:,.0f}), and "
            "temporary buffers",
            f"folder: {self.folder}, grids in {self.folder / 'validation'}",
            f"disk: {self.disk / MIB:,.0f} MiB ({self.num_checkpoints} + 1 checkpoints of {self.trained / MIB:,.0f})",
        ]

    def require_room(self, folder: Path, taken: int, free_memory: int | None) -> None:
        """Refuse a run whose checkpoints would not fit or cannot be written; warn of one whose step may not fit.

        Args:
            folder: Folder of the run; it need not exist.
            taken: Bytes of checkpoints that are there already and will be replaced.
            free_memory: Free bytes of the device, or ``None`` where unknown.

        Raises:
            InputError: The disk has too little room, or the folder cannot be made or written to.
        """
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise InputError(
                f"The run cannot write to {folder}: {nearest} is {'read-only' if nearest.is_dir() else 'no folder'}. Give "
                "another --out."
            )
        free = shutil.disk_usage(nearest).free
        needed = max(self.disk - taken, self.trained)
        if free < needed:
            raise InputError(
                f"The run needs {needed / MIB:,.0f} MiB for checkpoints in {folder}, and {free / MIB:,.0f} MiB are "
                "free there. Make room, lower keep_checkpoints, or give another --out."
            )
        if free_memory is not None and free_memory < self.memory:
            logger.warning(
                "A step needs about %.0f MiB, the device has %.0f MiB free. Where it runs out of memory, lower "
                "batch_size (and raise gradient_accumulation), or set gradient_checkpointing = true.",
                self.memory / MIB,
                free_memory / MIB,
            )


class SavedBytes:
    """Counts the bytes that autograd keeps, each storage once.

    Args:
        excluded: Tensors that exist anyway, such as weights.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self._excluded = {_storage(tensor) for tensor in excluded}
        self._sizes: dict[int, int] = {}
        self._kept: list[Tensor] = []  # an address is not given out again while its tensor lives

    @property
    def total(self) -> int:
        """Bytes kept so far."""
        return sum(self._sizes.values())

    def counting(self) -> Any:
        """Return a context; forward passes inside it are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._excluded and storage not in self._sizes:
            self._sizes[storage] = tensor.untyped_storage().nbytes()
            self._kept.append(tensor)
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def estimate_saved_bytes(
    module: InjectedUNet,
    *,
    batch_size: int,
    target_px: tuple[int, int],
    reference_px: int,
    dtype: torch.dtype,
    is_checkpointed: bool,
) -> int:
    """Foretell what one training step keeps, by running it on tensors without contents.

    Args:
        module: The U-Net (diffusers') with its adapters.
        batch_size: Rows of the step.
        target_px: Height and width of the targets.
        reference_px: Side of the references.
        dtype: Float type that the U-Net computes in.
        is_checkpointed: Whether activations are computed again in the backward pass.

    Returns:
        Bytes, without weights, gradients and temporary buffers.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    real: Any = module.unet
    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with _default_dtype(dtype):  # fake weights cannot be converted
            unet = type(real).from_config(real.config)
        if is_checkpointed:
            unet.enable_gradient_checkpointing()
        fake = InjectedUNet(unet, AdapterSet(module.adapters.info))
        text = torch.empty(batch_size, TEXT_TOKENS, real.config.cross_attention_dim, dtype=dtype)
        conditions = _added_conditions(real.config, batch_size, dtype)
        reference, target = (
            torch.empty(
                batch_size,
                real.config.in_channels,
                height // LATENT_FACTOR,
                width // LATENT_FACTOR,
                dtype=dtype,
            )
            for height, width in ((reference_px, reference_px), target_px)
        )
        cache = fake.capture(reference, text, conditions)
        saved = SavedBytes([*unet.parameters(), *fake.parameters()])
        timesteps = torch.empty(batch_size, dtype=torch.int64)
        with fake.until_backward(), saved.counting():
            fake(cache, target, timesteps, text, conditions)
        return saved.total


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _added_conditions(config: Any, batch_size: int, dtype: torch.dtype) -> dict[str, Any]:
    if config.addition_embed_type is None:
        return {}
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pooled = torch.empty(batch_size, width, dtype=dtype)
    ids = torch.empty(batch_size, 6, dtype=dtype)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
