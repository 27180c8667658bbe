"""What the core has to know about ``torch.compile``: hooks that come after it are ignored silently."""

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def is_compiled(module: nn.Module) -> bool:
    """Whether a module, or a part of it, is the result of ``torch.compile``."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return hasattr(module, "_orig_mod") or any(
        getattr(part, "_compiled_call_impl", None) is not None for part in parts
    )


def plain_module(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, or the module itself."""
    return getattr(module, "_orig_mod", module)


class _Uncompiled:
    """Sets ``torch.compile`` aside while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            # set_stance loads the compiler, and what was never loaded has compiled nothing
            has_compiler = "torch._dynamo" in sys.modules
            if self._depth == 0 and has_compiler and hasattr(torch.compiler, "set_stance"):
                self._stance = torch.compiler.set_stance("force_eager")
            self._depth += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._stance is not None:
                self._stance.__exit__(*error)
                self._stance = None


uncompiled = _Uncompiled()
"""Context in which compiled modules run as they were written; torch before 2.6 cannot, and runs them compiled."""


@contextmanager
def temporary_hooks(unet: nn.Module, hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Let hooks be heard, also by a compiled U-Net, and take them out at exit, whatever happens."""
    try:
        with uncompiled if is_compiled(unet) else nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()
