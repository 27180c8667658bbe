"""Safetensors files with a checksum, and telling what a foreign file is. Knows nothing of adapters and caches.

A file is judged by its header: what it is, and how large its tensors are, before any of their values is read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import FileFormatError, InputError
from .torch_file import inspect_torch_file, is_torch_file, nested_keys, read_torch_file
from .whole_files import whole_file

PREFIX = "dreamcache."
DIGEST_KEY = f"{PREFIX}sha256"
FORMAT_KEY = f"{PREFIX}format"
MAX_SHOWN = 120
"""Characters of a name that a message shows."""


def write_tensor_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata to a safetensors file, all or nothing.

    Args:
        path: Target; its folder must exist. An old file is replaced only after the new one is complete.
        tensors: Tensors by key, any device.
        metadata: Entries without the ``dreamcache.`` prefix; a checksum over everything is added.

    Raises:
        InputError: The folder does not exist or cannot be written to, or the target is a folder.
    """
    target = Path(path)
    # clone: safetensors refuses tensors that share memory
    stored = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    entries = {PREFIX + key: value for key, value in metadata.items()}
    entries[DIGEST_KEY] = _digest(stored, entries)
    try:
        with whole_file(target, by=uuid4().hex) as temporary:
            # not save_file, nor mkstemp: only their owner may read their files
            temporary.write_bytes(save(stored, entries))
    except OSError as error:
        raise InputError(
            f"Cannot write {target}: {error.strerror}. Give a file name in a folder that exists, is writable and has room."
        ) from error


def read_tensor_file(
    path: str | os.PathLike[str], expected: str, *, mapped: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file written by ``write_tensor_file`` and verify its checksum.

    Args:
        path: The file.
        expected: The format that it must have: ``adapters/1``, ``reference/1``.
        mapped: See ``read_weights``.

    Returns:
        Tensors by key on the CPU, and metadata without the ``dreamcache.`` prefix.

    Raises:
        FileFormatError: The file is damaged, of another kind or of another format.
    """
    header = read_header(path)
    found = header.entries.get(FORMAT_KEY)
    if header.is_torch or found != expected:
        kind = f"a DreamCache file of format {found}" if found else kind_of_weights(header.tensors)
        kind = f"a torch file (.pt, .ckpt, .bin): {kind}" if header.is_torch else kind
        raise FileFormatError(f"{path} is {kind}; expected a DreamCache file of format {expected}.")
    tensors = read_weights(path, header, mapped=mapped)
    if header.entries.get(DIGEST_KEY) != _digest(tensors, header.entries):
        raise FileFormatError(
            f"{path} is damaged: its contents do not match its checksum. Copy or download it again."
        )
    return tensors, header.metadata


class Header(NamedTuple):
    """What a file of weights says of itself.

    Attributes:
        tensors: Shape and type of each tensor by key, on the device ``meta``.
        entries: Its metadata as stored.
        is_torch: Whether it is a torch file.
    """

    tensors: dict[str, Tensor]
    entries: dict[str, str]
    is_torch: bool = False

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata without the ``dreamcache.`` prefix."""
        return {key.removeprefix(PREFIX): value for key, value in self.entries.items()}

    @property
    def dtypes(self) -> set[str]:
        """Names of the tensors' types, ``float16`` say."""
        return {str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read what tensors a safetensors or torch file holds, but not their values.

    Args:
        path: The file.

    Raises:
        FileFormatError: It is missing, damaged, or holds something else than tensors by key.
    """
    if is_torch_file(refuse_non_weights(path)):
        content = inspect_torch_file(Path(path))
        is_dict = isinstance(content, dict)
        if not is_dict or not all(isinstance(value, Tensor) for value in content.values()):
            held = shorten(map(str, content)) if is_dict else type(content).__name__
            raise FileFormatError(
                f"{path} is {kind_of_weights(nested_keys(content))}, not a flat dictionary of tensors (found {held})."
            )
        return Header({str(key): tensor for key, tensor in content.items()}, {}, is_torch=True)
    with _open(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return Header({key: _shape_of(each) for key, each in slices.items()}, file.metadata() or {})


def read_weights(
    path: str | os.PathLike[str], header: Header, *, mapped: bool = False
) -> dict[str, Tensor]:
    """Read the tensors of a file.

    Args:
        path: The file.
        header: What ``read_header`` said of it.
        mapped: Whether tensors of a safetensors file are views of it, which change when it is written to.

    Returns:
        Tensors by key on the CPU.

    Raises:
        FileFormatError: It is damaged, or cannot be read safely.
    """
    if header.is_torch:
        return read_torch_file(Path(path), header.tensors)
    with _open(path) as file:
        views = {key: file.get_tensor(key) for key in header.tensors}
        return views if mapped else {key: view.clone() for key, view in views.items()}


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # pyright: ignore[reportUnknownVariableType]
            yield file
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise FileFormatError(
            f"{path} is not a complete safetensors file ({error}). Copy or download it again."
        ) from error


def _shape_of(stored: Any) -> Tensor:
    dtype = _DTYPES.get(stored.get_dtype(), torch.uint8)
    return torch.empty(stored.get_shape(), dtype=dtype, device="meta")


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
"""Types by their names in safetensors files; the others count as bytes."""


def refuse_non_weights(path: str | os.PathLike[str]) -> bytes:
    """Refuse files that cannot hold weights at all, each with its own explanation.

    Args:
        path: The file.

    Returns:
        The file's first bytes, at most 512.

    Raises:
        FileFormatError: Missing, unreadable, empty, a web page, a Git LFS pointer or other text.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():  # a pipe would not end
            raise ValueError("it is no file")
        with file.open("rb") as stream:
            head = stream.read(512)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(
            f"There is no readable file {file}: {reason}. Check the path."
        ) from error
    if not head:
        raise FileFormatError(f"{file} is empty (0 bytes): the download failed. Download it again.")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        raise FileFormatError(
            f"{file} is a Git LFS pointer, not the weights: the repository was cloned without LFS. Run 'git lfs "
            "pull' there, or download the file from the model's page."
        )
    if start.startswith((b"\x89png", b"\xff\xd8\xff", b"gif8", b"%pdf")):
        raise FileFormatError(
            f"{file} is an image or a document, not weights. Give a .safetensors or .pt file."
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise FileFormatError(
            f"{file} is a web page, not weights: the link led to a page instead of the file. Download it with the "
            "page's download button (a raw or resolve link)."
        )
    return head


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor of any float type are finite; of one without values nothing is known."""
    return tensor.is_meta or bool(tensor.float().isfinite().all())


def kind_of_weights(keys: Mapping[str, object] | set[str]) -> str:
    """Say what a set of weights is, by its keys.

    Args:
        keys: The keys of a state dict.

    Returns:
        A noun phrase for messages: ``"a LoRA"``, ``"a base model (checkpoint)"``, ...
    """
    for kind, marks in _KINDS:
        if any(mark in key for key in keys for mark in marks):
            return kind
    return "a file of other weights"


_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("DreamCache adapters as the authors released them", ("attn_mem.", "norm2_mem.")),
    ("a LoRA", ("lora_up.", "lora_down.", "lora_A.", "lora_B.", "lora.up.", "hada_w1", "lokr_w1")),
    ("an IP-Adapter", ("ip_adapter.", "image_proj.", "to_k_ip.")),
    ("a ControlNet", ("control_model.", "controlnet_", "zero_convs.", "input_hint_block")),
    ("a base model (checkpoint)", ("model.diffusion_model.", "cond_stage_model.", "conditioner.")),
    ("a base model (U-Net)", ("input_blocks.", "down_blocks.", "double_blocks.", "joint_blocks.")),
    ("a VAE", ("decoder.conv_in", "first_stage_model.")),
    ("a text encoder", ("text_model.", "token_embedding")),
)


def shorten(names: Iterable[str], most: int = 6) -> str:
    """List names for a message: of many the first, of long ones the beginning."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(name[:MAX_SHOWN] for name in listed[:most]) + more


def _digest(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    header = {
        "metadata": {key: value for key, value in sorted(entries.items()) if key != DIGEST_KEY},
        "tensors": [[key, str(t.dtype), list(t.shape)] for key, t in sorted(tensors.items())],
    }
    digest.update(json.dumps(header, sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> Any:
    """A CPU tensor's values as a buffer of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
