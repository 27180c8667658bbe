"""Safetensors files with a checksum, and telling what a foreign file is. Knows nothing of adapters and caches."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import FileFormatError, InputError
from .whole_files import whole_file

PREFIX = "dreamcache."
DIGEST_KEY = f"{PREFIX}sha256"
FORMAT_KEY = f"{PREFIX}format"


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
    path: str | os.PathLike[str], expected: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file written by ``write_tensor_file`` and verify its checksum.

    Args:
        path: The file.
        expected: The format that it must have: ``adapters/1``, ``reference/1``.

    Returns:
        Tensors by key on the CPU, and metadata without the ``dreamcache.`` prefix.

    Raises:
        FileFormatError: The file is damaged, of another kind or of another format.
    """
    tensors, entries = read_safetensors(path)
    return tensors, verify_tensor_file(path, tensors, entries, expected)


def verify_tensor_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, str],
    expected: str,
) -> dict[str, str]:
    """Verify what was read of a file written by ``write_tensor_file``.

    Args:
        path: The file, for messages.
        tensors: All its tensors.
        entries: Its metadata as stored.
        expected: See ``read_tensor_file``.

    Returns:
        Metadata without the ``dreamcache.`` prefix.

    Raises:
        FileFormatError: The file is damaged, of another kind or of another format.
    """
    found = entries.get(FORMAT_KEY)
    if found != expected:
        kind = f"a DreamCache file of format {found}" if found else kind_of_weights(tensors)
        raise FileFormatError(f"{path} is {kind}; expected a DreamCache file of format {expected}.")
    if entries.get(DIGEST_KEY) != _digest(tensors, entries):
        raise FileFormatError(
            f"{path} is damaged: its contents do not match its checksum. Copy or download it again."
        )
    return {key.removeprefix(PREFIX): value for key, value in entries.items()}


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read any safetensors file.

    Args:
        path: The file.

    Returns:
        Tensors by key on the CPU, and the metadata as stored.

    Raises:
        FileFormatError: The file is missing, empty, truncated or no safetensors file at all.
    """
    if is_torch_file(refuse_non_weights(path)):
        raise FileFormatError(
            f"{path} is a torch file (.pt, .ckpt, .bin); expected a safetensors file."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # pyright: ignore[reportUnknownVariableType]
            metadata: dict[str, str] = dict(file.metadata() or {})
            # clone: what get_tensor returns is mapped, and changes when the file is written to
            tensors: dict[str, Tensor] = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise FileFormatError(
            f"{path} is not a complete safetensors file ({error}). Copy or download it again."
        ) from error
    return tensors, metadata


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


def is_torch_file(head: bytes) -> bool:
    """Tell a torch file (zip archive or pickle) from a safetensors file, which may begin with any eight bytes.

    Args:
        head: The file's first bytes, at least nine.
    """
    return head.startswith((b"PK", b"\x80")) and head[8:9] != b"{"


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


def _digest(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    header = {
        "metadata": {key: value for key, value in sorted(entries.items()) if key != DIGEST_KEY},
        "tensors": [[key, str(t.dtype), list(t.shape)] for key, t in sorted(tensors.items())],
    }
    digest.update(json.dumps(header, sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()
