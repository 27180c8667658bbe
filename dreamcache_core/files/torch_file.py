"""Torch files (``.pt``, ``.ckpt``, ``.bin``): what one holds, told without unpickling it; then read weights-only.

A pickle is a program. Of its instructions only those that ``torch.save`` writes for dictionaries of tensors are followed
here, on descriptions: no code runs, and sizes are known before anything is allocated.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FileFormatError

SAFE_SINCE = (2, 6)
"""Version of PyTorch whose weights-only reading cannot be got round (CVE-2025-32434)."""

MAX_PICKLE_BYTES, MAX_INSTRUCTIONS = 2**22, 2**19
MAX_AXES, MAX_INTEGER = 16, 2**48
MAX_NESTED_KEYS, MAX_PREFIX = 10_000, 200
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
FOLDER_BIT = 0x10
"""External attribute of a zip archive's member: torch writes it nowhere, and takes such a member for empty."""


class _MoreThanTensorsError(Exception):
    """The file asks for something that is no tensor."""


class _Storage(NamedTuple):
    """What tensors lie in: its name in the file, and how many values of a type it has."""

    key: str
    dtype: torch.dtype
    size: int


def is_torch_file(head: bytes) -> bool:
    """Tell a torch file (zip archive or pickle) from a safetensors file, which may begin with any eight bytes.

    Args:
        head: The file's first bytes, at least nine.
    """
    return head.startswith((b"PK", b"\x80")) and head[8:9] != b"{"


def inspect_torch_file(path: Path) -> Any:
    """Say what a torch file holds, without reading values.

    Args:
        path: The file.

    Returns:
        What was saved, to be a dictionary of tensors by key; tensors are on the device ``meta``.

    Raises:
        FileFormatError: It is damaged, holds more than tensors, or claims to hold more than fits into it.
    """
    try:
        return _inspect_archive(path) if zipfile.is_zipfile(path) else _inspect_old_file(path)
    except _MoreThanTensorsError as error:
        raise FileFormatError(
            f"{path} holds more than tensors ({error}), so reading it could run code; it was not read. Expected a torch "
            "file with a flat dictionary of tensors."
        ) from error
    except Exception as error:
        # a damaged archive or pickle can raise nearly anything
        raise _incomplete(path, f"{type(error).__name__}: {error}") from error


def read_torch_file(path: Path, found: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Read a torch file weights-only.

    Args:
        path: The file.
        found: What ``inspect_torch_file`` found in it: a dictionary of tensors.

    Returns:
        Tensors by key on the CPU.

    Raises:
        FileFormatError: It is damaged, its tensors share values, or this PyTorch cannot read it safely.
    """
    version = tuple(int(number) for number in re.findall("[0-9]+", torch.__version__)[:2])
    if version < SAFE_SINCE:
        raise FileFormatError(
            f"{path} is a torch file, and such a file can run code in PyTorch {torch.__version__}. Update PyTorch to 2.6 or "
            f"newer, or convert the file where that is: dreamcache convert {path.name} adapters.safetensors."
        )
    if sum(tensor.nbytes for tensor in found.values()) > path.stat().st_size:
        raise FileFormatError(
            f"{path} is smaller than its tensors, which share values. Save each with values of its own."
        )
    try:
        _refuse_damaged_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about the pickle's protocol
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        return {str(key): value for key, value in loaded.items()}
    except FileFormatError:
        raise
    except Exception as error:
        raise _incomplete(path, type(error).__name__) from error


def nested_keys(content: Any) -> set[str]:
    """Join the keys of nested dictionaries by dots, for a look at what they are; of very many some.

    Args:
        content: The outer dictionary; anything else has the empty key.
    """
    keys: set[str] = set()
    pending, seen = [("", content)], set[int]()
    while pending and len(keys) < MAX_NESTED_KEYS:
        prefix, value = pending.pop()
        if not isinstance(value, dict):
            keys.add(prefix)
        elif id(value) not in seen:
            seen.add(id(value))
            pending += [(f"{prefix[-MAX_PREFIX:]}{key}.", entry) for key, entry in value.items()]
    return keys


def _incomplete(path: Path, reason: str) -> FileFormatError:
    return FileFormatError(
        f"{path} is not a complete torch file ({reason[:MAX_PREFIX]}). Download it again."
    )


def _refuse_damaged_archive(path: Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise FileFormatError(f"{path} is damaged at {damaged}. Download it again.")


def _inspect_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        sizes = {each.filename: each.file_size for each in archive.infolist()}
        if any(name.rpartition("/")[2] == "constants.pkl" for name in sizes):
            raise _MoreThanTensorsError("a TorchScript program")
        for each in archive.infolist():
            if each.compress_type != zipfile.ZIP_STORED or each.external_attr & FOLDER_BIT:
                raise ValueError(f"{each.filename} is not as torch writes it")
        if sum(sizes.values()) > path.stat().st_size:
            raise ValueError("members overlap")
        (name,) = (name for name in sizes if name.endswith("data.pkl"))
        content, storages = _follow(io.BytesIO(archive.read(name)[:MAX_PICKLE_BYTES]))
    folder = name.removesuffix("data.pkl")
    for each in storages:
        if sizes[f"{folder}data/{each.key}"] < each.size * each.dtype.itemsize:
            raise ValueError("a storage is cut short")
    return content


def _inspect_old_file(path: Path) -> Any:
    """Inspect what PyTorch wrote before 1.6: pickles one after the other, then the values."""
    with path.open("rb") as stream:
        data = io.BytesIO(stream.read(MAX_PICKLE_BYTES))
    magic, _ = _follow(data)
    for _ in range(2):  # version of the format, and sizes of C's types
        _follow(data)
    content, storages = _follow(data)
    num_bytes = sum(each.size * each.dtype.itemsize for each in set(storages))
    if magic != MAGIC_NUMBER or num_bytes > path.stat().st_size:
        raise ValueError("cut short, or another pickle")
    return content


def _follow(data: io.BytesIO) -> tuple[Any, list[_Storage]]:
    """Follow a pickle to its end -> what it makes, and the storages that it names."""
    machine = _Machine()
    for number, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        if instruction.name == "STOP":
            return machine.pop(1)[0], machine.storages
        if number == MAX_INSTRUCTIONS:
            break
        _RULES[instruction.name](machine, argument)
    raise ValueError("too long a pickle")


class _Machine:
    """The stack of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[_Storage] = []

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int | None = None) -> list[Any]:
        """Take the uppermost values; without a count, all above the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < 0:
            raise ValueError("nothing on the stack")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def extend(self, values: Sequence[Any]) -> None:
        self.stack[-1].extend(values)

    def update(self, values: Sequence[Any]) -> None:
        # to hash a nested tuple may take for ever
        if not all(isinstance(key, str | int) for key in values[::2]):
            raise _MoreThanTensorsError("keys that are no texts")
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def push_known(self, name: str) -> None:
        if name not in _KNOWN:
            raise _MoreThanTensorsError(name)
        self.push(_KNOWN[name])

    def push_storage(self, identity: tuple[Any, ...]) -> None:
        _, dtype, key, _, count = identity[:5]
        storage = _Storage(key, dtype, *_sizes((count,)))
        self.storages.append(storage)
        self.push(storage)


def _sizes(values: Sequence[Any]) -> tuple[int, ...]:
    if len(values) > MAX_AXES or not all(
        isinstance(v, int) and 0 <= v <= MAX_INTEGER for v in values
    ):
        raise ValueError("no sizes")
    return tuple(values)


def _describe(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    """Stand for ``torch._utils._rebuild_tensor_v2``."""
    sizes, steps, (start,) = _sizes(shape), _sizes(strides), _sizes((offset,))
    last = start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    count = math.prod(sizes)
    if count and max(last + 1, count) > storage.size:
        raise ValueError("a tensor is larger than its storage")
    return torch.empty(sizes, dtype=storage.dtype, device="meta")


_KNOWN: dict[str, Any] = {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor_v2": _describe,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch ComplexFloatStorage": torch.complex64,
    "torch ComplexDoubleStorage": torch.complex128,
}
"""What a pickle may name, and what stands for it."""

_LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")

_RULES: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_LITERALS, _Machine.push),
    "PROTO": lambda *_: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop())),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop()),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.pop()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "LONG_BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "GLOBAL": _Machine.push_known,
    "BINPERSID": lambda machine, _: machine.push_storage(*machine.pop(1)),
    "REDUCE": lambda machine, _: machine.push(_call(*machine.pop(2))),
    "BUILD": lambda machine, _: machine.pop(1),  # attributes of an OrderedDict
}
"""What each instruction does."""


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)
