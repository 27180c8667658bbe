"""The authors' numbers on two tiny U-Nets, and the weights that belong to them. See tests/golden/README.md."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "golden"
CASES = ("sd21_tiny", "sd15_tiny")
ADAPTER_MARKS = ("attn_mem.", "norm2_mem.", "linear_cat.")
S_TEXT, S_IMAGE = 7.5, 0.4


@dataclass(frozen=True)
class GoldenCase:
    """One tiny U-Net: weights by ldm name (adapters apart) and the vectors."""

    name: str
    unet_weights: dict[str, Tensor]
    adapter_weights: dict[str, Tensor]
    vectors: dict[str, Tensor]
    context_width: int
    head_width: int | None
    num_heads: int | None

    @property
    def family(self) -> str:
        return f"custom-{self.context_width}"


def load_case(name: str) -> GoldenCase:
    shapes = json.loads((DATA / f"{name}.shapes.json").read_text())
    weights = {key: make_weight(key, shape) for key, shape in shapes.items()}
    is_adapter = {key: any(mark in key for mark in ADAPTER_MARKS) for key in weights}
    return GoldenCase(
        name=name,
        unet_weights={k: v for k, v in weights.items() if not is_adapter[k]},
        adapter_weights={k: v for k, v in weights.items() if is_adapter[k]},
        vectors=load_file(DATA / f"{name}.safetensors"),
        context_width=48 if name == "sd21_tiny" else 40,
        head_width=16 if name == "sd21_tiny" else None,
        num_heads=None if name == "sd21_tiny" else 4,
    )


def make_weight(name: str, shape: list[int]) -> Tensor:
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) >= 2:
        values = normal / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        values = 1 + 0.1 * normal
    else:
        values = 0.02 * normal
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def alphas_cumprod() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def largest_error(ours: Tensor, golden: Tensor) -> float:
    return (ours.double() - golden.double()).abs().max().item()


def relative_error(ours: Tensor, golden: Tensor) -> float:
    return largest_error(ours, golden) / golden.abs().max().item()
