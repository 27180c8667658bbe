"""ComfyUI's dynamic VRAM, the default on NVIDIA cards, at work on a CPU.

``ModelPatcherDynamic``, the casts and comfy-aimdo's Python are the real ones. What has to be replaced is comfy-aimdo's native
library, which hands out pages of a card's memory, and the rule that a CPU is no such card: the device is ``cpu:0`` here, which
ComfyUI holds for another one than ``cpu``, where models are offloaded to.
"""

import ctypes
import os
from contextlib import nullcontext
from typing import Any

import comfy.memory_management
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy_aimdo.control
import comfy_aimdo.host_buffer
import comfy_aimdo.model_mmap
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import comfy_aimdo.vram_buffer
import numpy as np
import torch

DEVICE = torch.device("cpu", 0)
FULL = 1  # what a fault answers when there is no memory left


class NativeLibrary:
    """comfy-aimdo's native library: a pool of pages, and files and buffers in memory.

    Args:
        capacity: Bytes of the pool. Pages that a model has lost read as NaN, in every float type.
    """

    IDLE = (
        "hostbuf_allocate",  # nothing is pinned
        "hostbuf_free",
        "vbar_prioritize",
        "vbar_unpin",
        "vbars_analyze",
        "vrambuf_grow",
    )

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: dict[int, np.ndarray] = {}
        self.resident: dict[tuple[int, int], int] = {}
        self.generations: dict[tuple[int, int], int] = {}
        self.used = 0

    def __getattr__(self, name: str) -> Any:
        """Answer 1, for done, to what has nothing to do here."""
        if name in self.IDLE:
            return lambda *_: 1
        raise AttributeError(name)

    def get_devctx(self, _: int) -> int:
        return 1

    def _keep(self, block: np.ndarray) -> int:
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def vbar_allocate(self, _: int, size: int, __: int) -> int:
        return self._keep(np.empty(size, np.uint8))

    def vbar_get(self, _: int, vbar: int) -> int:
        return vbar

    def vbar_fault(self, _: int, vbar: int, offset: int, size: int, signature: Any) -> int:
        page = (vbar, offset)
        if page not in self.resident:
            others = (other for other in list(self.resident) if other[0] != vbar)
            while self.used + size > self.capacity and (other := next(others, None)):
                self._evict(other)
            if self.used + size > self.capacity:
                return FULL
            self.resident[page] = size
            self.used += size
            self.generations[page] = self.generations.get(page, 0) + 1
        signature[0] = self.generations[page]
        return 0

    def _evict(self, page: tuple[int, int]) -> int:
        size = self.resident.pop(page)
        self.used -= size
        ctypes.memset(page[0] + page[1], 0xFF, size)
        return size

    def vbar_loaded_size(self, _: int, vbar: int) -> int:
        return sum(size for page, size in self.resident.items() if page[0] == vbar)

    def vbar_free_memory(self, _: int, vbar: int, size: int) -> int:
        freed = 0
        for page in [page for page in self.resident if page[0] == vbar]:
            if freed < size:
                freed += self._evict(page)
        return freed

    def vbar_free(self, _: int, vbar: int) -> None:
        self.vbar_free_memory(1, vbar, self.capacity)
        del self.blocks[vbar]

    def vrambuf_create(self, _: int, size: int) -> int:
        return self._keep(np.empty(size, np.uint8))

    def vrambuf_get(self, buffer: int) -> int:
        return buffer

    def vrambuf_destroy(self, buffer: int) -> bool:
        del self.blocks[buffer]
        return True

    def model_mmap_allocate(self, path: bytes) -> int:
        return self._keep(np.fromfile(os.fsdecode(path), np.uint8))

    def model_mmap_get(self, address: int) -> int:
        return address

    def model_mmap_get_file_handle(self, _: int) -> int:
        return -1

    def model_mmap_deallocate(self, address: int) -> None:
        del self.blocks[address]


class Stream:
    """The stream on which weights are copied to a card while it computes; here there is one thing at a time."""

    as_context = staticmethod(nullcontext)

    def wait_stream(self, _: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def enable(capacity: int) -> None:
    """Switch it on, for models that are loaded from now on.

    Args:
        capacity: Bytes of the device's memory for weights.
    """
    library = NativeLibrary(capacity)
    for module in ("control", "host_buffer", "model_mmap", "model_vbar", "vram_buffer"):
        getattr(comfy_aimdo, module).lib = library
    comfy_aimdo.control.devctxs = [1]
    comfy_aimdo.torch.aimdo_to_tensor = _to_tensor
    comfy.cli_args.args.disable_pinned_memory = True  # registers with CUDA
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    management.is_device_cpu = lambda device: device == torch.device("cpu")
    management.get_torch_device = lambda: DEVICE
    management.text_encoder_device = lambda: DEVICE
    management.DEFAULT_AIMDO_CAST_BUFFER_RESERVATION_SIZE = 2**26
    management.NUM_STREAMS = 1
    management.STREAMS[DEVICE] = [Stream()]
    cast = comfy.ops.cast_bias_weight

    def cast_bias_weight(layer: Any, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        # tensors forget the number of their device
        if hasattr(layer, "_v"):
            kwargs["device"] = DEVICE
        return cast(layer, input, *args, **kwargs)

    comfy.ops.cast_bias_weight = cast_bias_weight


def _to_tensor(allocation: tuple[Any, int, int], _: torch.device) -> torch.Tensor:
    owner, address, size = allocation
    view = (ctypes.c_uint8 * size).from_address(address)
    view.owner = owner  # the memory lives as long as what is read from it
    return torch.frombuffer(view, dtype=torch.uint8)
