"""Count floating-point operations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch counts its attention kernels for GPUs, but not those for the CPU
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(action: Callable[[], Tensor | None]) -> int:
    """Count what an action multiplies and adds in matrices, convolutions and attention, a multiply-add as two.

    Args:
        action: What to count; it is carried out, backward passes included.

    Returns:
        Floating-point operations.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        action()
    return counter.get_total_flops()
