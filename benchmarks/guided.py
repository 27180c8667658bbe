"""One guided step in several ways, for ``step`` and ``memory``: all on the same random weights, which are in memory once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreamcache_core import (
    AdapterSet,
    ReferenceCache,
    ReferenceUse,
    capture_reference,
    inject,
    prepare_for_compile,
)
from dreamcache_core.method.adapter import AdapterInfo, FusedAdapterSet
from dreamcache_core.method.backends import layout_of, select_sites
from dreamcache_core.method.guidance import combine_guidance

from .models import SDXL, TOKENS, make_unet
from .textbook import TextbookAdapter
from .textbook_step import TextbookStep

DREAMCACHE = "DreamCache"
THREE_ROWS = "plain U-Net, the same three rows"
THREE_ROWS_AGAIN = "the same once more"
TEXTBOOK = "textbook"
TWO_ROWS = "plain guidance, two rows"
DREAMCACHE_TWO = "DreamCache at image_guidance 1, two rows"
DREAMCACHE_JOINT = "DreamCache with joint guidance, two rows"
ALL_STEPS = (
    DREAMCACHE,
    THREE_ROWS,
    THREE_ROWS_AGAIN,
    DREAMCACHE_TWO,
    DREAMCACHE_JOINT,
    TWO_ROWS,
    TEXTBOOK,
)

COMPILED, COMPILED_ROWS = "DreamCache, compiled", "plain U-Net, the same three rows, compiled"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TIMESTEP, TEXT_SCALE, IMAGE_SCALE = 500, 7.5, 0.4
TEXTBOOK_NAMES = {"norm": "norm2_mem", "merge": "linear_cat"}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        size: Name of the U-Net's size.
        latent: Height and width of the latents, of image and reference.
        dtype: Name of the float type.
        device: ``cpu`` or ``cuda``.
        batch: Images.
        references: Images of the subject.
        coverage: Share of each image's upper rows that a subject mask keeps; 1: no mask.
    """

    size: str
    latent: int
    dtype: str
    device: str
    batch: int = 1
    references: int = 1
    coverage: float = 1.0

    @property
    def are_times_promised(self) -> bool:
        """Whether there are bars for times: below Stable Diffusion's size a step is too short to be timed to a few per cent."""
        return self.size in ("sd15", "sd21") and self.latent == 64


class GuidedSteps:
    """U-Net, adapters, reference and inputs of a step.

    Args:
        settings: What to build.
        seed: Seed of all weights and inputs; the global random state is left alone.
    """

    def __init__(self, settings: Settings, seed: int = 0) -> None:
        self.settings = settings
        self.device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with self.device:
                unet: Any = make_unet(settings.size, settings.latent)
            self.unet = unet.to(dtype)
            self.adapters = _random_adapters(self.unet)
            side, width = settings.latent, self.unet.config.cross_attention_dim
            self.latents = self._random((settings.batch, 4, side, side), dtype)
            self.text = self._random((2, TOKENS, width), dtype)  # negative, prompt
            images = self._random((settings.references, 4, side, side), dtype)
            self.conditions = self._conditions(1, dtype)
            self.reference: ReferenceCache = capture_reference(
                self.unet, images, 1, self.text[:1], unet_kwargs=self.conditions
            )
            if settings.coverage < 1:
                self.reference = _masked(self.reference, settings.coverage)
        self.fused: FusedAdapterSet = self.adapters.fuse(dtype=dtype).to(self.device)

    @contextmanager
    def ready(
        self,
        names: Sequence[str] = ALL_STEPS,
        backend: str | None = None,
    ) -> Iterator[dict[str, Callable[[], Tensor]]]:
        """Give the steps by name, while references are injected where they belong.

        Keys and values of the reference are projected by the first DreamCache step and kept, as during a sampling run.

        Args:
            names: Which; the textbook form knows Stable Diffusion 1 and 2 alone, and is left out for SDXL.
            backend: Of ``torch.compile``, for ``COMPILED`` and ``COMPILED_ROWS`` besides; ``None``: these are left out.
        """
        injected, without_third, joint = (twin(self.unet) for _ in range(3))
        steps: dict[str, Callable[[], Tensor]] = {
            DREAMCACHE: lambda: self._combined(injected, 3),
            THREE_ROWS: lambda: self._combined(self.unet, 3),
            THREE_ROWS_AGAIN: lambda: self._combined(self.unet, 3),
            DREAMCACHE_TWO: lambda: self._combined(without_third, 2),
            DREAMCACHE_JOINT: lambda: self._combined(joint, 2),
            TWO_ROWS: lambda: self._combined(self.unet, 2),
        }
        if TEXTBOOK in names and self.settings.size != SDXL:
            steps[TEXTBOOK] = self._textbook()
        use, batch = ReferenceUse(self.reference, self.fused), self.settings.batch
        three = [False] * batch + [True] * 2 * batch
        with (
            torch.no_grad(),
            inject(injected, use, rows=three),
            inject(without_third, use),
            inject(joint, use, rows=[False] * batch + [True] * batch),
            ExitStack() as stack,
        ):
            chosen = {name: step for name, step in steps.items() if name in names}
            if backend:
                plain, compiled = twin(self.unet), twin(self.unet)
                for unet in (plain, compiled):
                    # both, as torch takes two modules that differ in hooks alone for one
                    prepare_for_compile(unet)
                    unet.compile(backend=backend)
                stack.enter_context(inject(compiled, use, rows=three))
                chosen[COMPILED_ROWS] = lambda: self._combined(plain, 3)
                chosen[COMPILED] = lambda: self._combined(compiled, 3)
            yield chosen

    def _combined(self, unet: Any, predictions: int) -> Tensor:
        """Call a U-Net once for all predictions, and combine them."""
        batch = self.settings.batch
        negative, prompt = self.text.chunk(2)
        texts = [negative] * (predictions - 1) + [prompt]
        states = torch.cat(texts).repeat_interleave(batch, dim=0)
        latents = self.latents.repeat(predictions, 1, 1, 1)
        options = self._conditions(predictions * batch, self.latents.dtype)
        output = unet(latents, TIMESTEP, states, return_dict=False, **options)[0]
        terms = output.chunk(predictions)
        if predictions == 2:
            return terms[0] + TEXT_SCALE * (terms[1] - terms[0])
        return combine_guidance(*terms, guidance_scale=TEXT_SCALE, image_guidance_scale=IMAGE_SCALE)

    def _textbook(self) -> Callable[[], Tensor]:
        sites = select_sites(self.unet, self.adapters.layers)
        adapters = {
            layer: _textbook_adapter(self.adapters[layer], sites[layer].heads).to(
                self.device, self.latents.dtype
            )
            for layer in self.adapters.layers
        }
        features = {
            layer: maps.to(self.device, self.latents.dtype)
            for layer, maps in self.reference.features.items()
        }
        step = TextbookStep(twin(self.unet), adapters, features)
        negative, prompt = (t.expand(self.settings.batch, -1, -1) for t in self.text.chunk(2))
        scales = {"guidance_scale": TEXT_SCALE, "image_guidance_scale": IMAGE_SCALE}
        return lambda: step(self.latents, TIMESTEP, negative, prompt, **scales)

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape).to(self.device, dtype)

    def _conditions(self, rows: int, dtype: torch.dtype) -> dict[str, Any]:
        """SDXL's further inputs (METHOD.md section 3); none for the others."""
        if self.settings.size != SDXL:
            return {}
        side = 8 * self.settings.latent
        ids = torch.tensor([[side, side, 0, 0, side, side]] * rows).to(self.device, dtype)
        pooled = torch.zeros(rows, 1280, device=self.device, dtype=dtype)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


def _masked(cache: ReferenceCache, coverage: float) -> ReferenceCache:
    """Keep the tokens of the upper rows of every image."""
    masks: dict[str, Tensor] = {}
    for layer, maps in cache.features.items():
        masks[layer] = torch.zeros(len(maps), *maps.shape[2:], dtype=torch.bool)
        masks[layer][:, : max(1, round(coverage * maps.shape[2]))] = True
    return dataclasses.replace(cache, masks=masks)


def twin(module: nn.Module) -> Any:
    """Copy a module's structure but not its weights: hooks on one leave the other alone."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo=shared)


def _random_adapters(unet: nn.Module) -> AdapterSet:
    adapters = AdapterSet(AdapterInfo(layout_of(unet)))
    for layer in adapters.layers:
        weight: Any = adapters[layer].get_parameter("merge.weight")
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return adapters.requires_grad_(False)


def _textbook_adapter(adapter: nn.Module, heads: int) -> TextbookAdapter:
    state = {}
    for name, weight in adapter.state_dict().items():
        module, parameter = name.split(".")
        state[f"{TEXTBOOK_NAMES.get(module, module)}.{parameter}"] = weight
    plain = TextbookAdapter(next(iter(state.values())).shape[0], heads)
    plain.load_state_dict(state)
    return plain.requires_grad_(False)
