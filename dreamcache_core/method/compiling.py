"""What the core has to know about ``torch.compile``: hooks that come after it are ignored silently."""

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def is_compiled(module: nn.Module) -> bool:
    """Whether a module, a part of it, or the ``forward`` of one is the result of ``torch.compile``."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return any(
        "_orig_mod" in part._modules
        or getattr(part, "_compiled_call_impl", None) is not None
        or hasattr(part.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for part in parts
    )


def plain_module(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, or the module itself."""
    return getattr(module, "_orig_mod", module)


class OwnClass:
    """A class of its own for a module with hooks, until ``remove``; it does what the module's class does.

    Graphs are kept by the code that was compiled, and torch guards no hooks: without this, the graph of another module of the
    class, one without hooks, would be taken for this one. The class of every module it does guard. With a copy of
    the code the module also has torch's number of graphs to itself.

    Args:
        module: Any module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.plain = module, type(module)
        members: dict[str, Any] = {"__module__": self.plain.__module__}
        if isinstance(forward := self.plain.forward, FunctionType):
            members["forward"] = _with_code_of_its_own(forward)
        module.__class__ = type(self.plain.__name__, (self.plain,), members)

    def remove(self) -> None:
        """Give the module its class back."""
        self.module.__class__ = self.plain


def _with_code_of_its_own(function: FunctionType) -> FunctionType:
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


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
