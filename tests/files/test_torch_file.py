"""Torch files of strangers: judged without running, unpickling or allocating what they ask for."""

import io
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamcache_core.errors import FileFormatError
from dreamcache_core.files.tensor_file import read_header, read_weights
from dreamcache_core.files.torch_file import inspect_torch_file
from dreamcache_core.method.adapter_files import load_adapters

MAX_S = 5.0


def stored(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def archive(path: Path, pickled: bytes, *, compression: int = 0, **members: bytes) -> Path:
    """Write a torch archive around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in {"data.pkl": pickled, "version": b"3", **members}.items():
            out.writestr(f"a/{name}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def refused(path: Path, match: str) -> None:
    start = time.process_time()
    with pytest.raises(FileFormatError, match=match):
        load_adapters(path)
    assert time.process_time() - start < MAX_S


@pytest.mark.parametrize("older", [False, True])
def test_types_and_shapes_are_told_without_values(tmp_path: Path, older: bool):
    content = {
        "a": torch.zeros(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.arange(6).reshape(2, 3).t(),
        "d": torch.nn.Parameter(torch.zeros(0)),
        7: torch.tensor(True),
    }
    path = stored(tmp_path / "a.pt", content, _use_new_zipfile_serialization=not older)
    found = read_header(path).tensors
    assert {key: (t.dtype, t.shape) for key, t in found.items()} == {
        str(key): (t.dtype, t.shape) for key, t in content.items()
    }
    assert all(tensor.is_meta for tensor in found.values())
    read = read_weights(path, read_header(path))
    assert all(torch.equal(read[str(key)], tensor) for key, tensor in content.items())


def test_module_state_is_told(tmp_path: Path):
    module = torch.nn.Linear(2, 3)
    path = stored(tmp_path / "a.pt", module.state_dict())
    assert {key: t.shape for key, t in inspect_torch_file(path).items()} == {
        "weight": (3, 2),
        "bias": (3,),
    }


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu121", "2.0.0a0"])
def test_torch_file_is_refused_where_weights_only_reading_can_be_got_round(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
):
    path = stored(tmp_path / "a.pt", {"a": torch.zeros(1)})
    header = read_header(path)
    monkeypatch.setattr(torch, "__version__", version)
    cure = r"Update PyTorch to 2\.6 or newer, or convert .*: dreamcache convert a\.pt"
    with pytest.raises(FileFormatError, match=cure):
        read_weights(path, header)


@pytest.mark.parametrize("place", ["", "code/", "x/y/"])
def test_archive_with_a_torchscript_program_is_refused(tmp_path: Path, place: str):
    path = stored(tmp_path / "a.pt", {"a": torch.zeros(1)})
    with zipfile.ZipFile(path, "a") as out:
        out.writestr(f"{place}constants.pkl", b"\x80\x02).")
    refused(path, "TorchScript program.*could run code; it was not read")


def test_dictionaries_within_one_another_are_named_at_once(tmp_path: Path):
    """Every level holds the one below twice: 2 ** 60 ways to the bottom."""
    level: dict[str, Any] = {"a": torch.zeros(1)}
    for _ in range(60):
        level = {"a": level, "b": level}
    refused(stored(tmp_path / "a.pt", level), "not a flat dictionary of tensors")


def test_dictionary_that_holds_itself_is_named(tmp_path: Path):
    content: dict[str, Any] = {}
    content["state_dict"] = content
    refused(stored(tmp_path / "a.pt", content), "not a flat dictionary .*found state_dict")


def test_nested_tuple_as_a_key_is_not_hashed(tmp_path: Path):
    key: Any = ()
    for _ in range(60):
        key = (key, key)
    inner = b"".join(b"q\0h\0\x86" for _ in range(60))  # put, get, tuple of two
    refused(archive(tmp_path / "a.pt", b"\x80\x02})" + inner + b"Ns."), "keys that are no texts")


def test_expanded_tensor_is_refused_before_it_takes_room(tmp_path: Path):
    """16 TB by one value."""
    refused(stored(tmp_path / "a.pt", {"a": torch.zeros(1).expand(2**42)}), "larger than its")


def test_tensors_that_share_their_values_are_refused(tmp_path: Path):
    stem = "diffusion_model.middle_block.1.transformer_blocks.0"
    names = [f"attn_mem.to_{n}.weight" for n in ("q", "k", "v", "out.0")]
    names += ["attn_mem.to_out.0.bias", "norm2_mem.weight", "norm2_mem.bias"]
    names += ["linear_cat.weight", "linear_cat.bias"]
    square, wide = torch.zeros(64, 64), torch.zeros(64, 128)
    shapes = [square] * 4 + [square[0]] * 3 + [wide, square[0]]
    tensors = {f"{stem}.{name}": value for name, value in zip(names, shapes, strict=True)}
    refused(stored(tmp_path / "a.pt", tensors), "smaller than its tensors, which share values")


def test_compressed_member_is_refused(tmp_path: Path):
    """2 GiB of zeros in 2 MB, if it were unpacked."""
    pickled = b"\x80\x02}" + text("a") + b"Ns."
    path = archive(tmp_path / "a.pt", pickled, compression=zipfile.ZIP_DEFLATED)
    refused(path, "not as torch writes it")


def test_member_that_is_listed_again_and_again_is_refused(tmp_path: Path):
    path = archive(tmp_path / "a.pt", b"\x80\x02}.", **{"data/0": bytes(4096)})
    content = path.read_bytes()
    (entry,) = [
        p for p in content.split(b"PK\x01\x02")[1:] if p.endswith(b"a/data/0") or b"a/data/0" in p
    ]
    entry = b"PK\x01\x02" + entry[: 42 + len("a/data/0")]
    end = content.rindex(b"PK\x05\x06")
    start = content.index(b"PK\x01\x02")
    copies = [entry.replace(b"data/0", b"data/%d" % n) for n in range(10)]
    listing = content[start:end] + b"".join(copies)
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 13, 13, len(listing), start, 0)
    path.write_bytes(content[:start] + listing + tail)
    refused(path, "members overlap")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3).to_sparse(),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        lambda: torch.Size([1]),
    ],
    ids=["sparse", "meta", "nested", "size"],
)
def test_tensors_of_other_kinds_are_refused(tmp_path: Path, make: Callable[[], Any]):
    content = {"a": make()}
    refused(stored(tmp_path / "a.pt", content), "more than tensors|not a flat|complete torch file")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02" + b"N" * 600_000 + b".",
        b"\x80\x02}" + text("k" * 3_000_000) + b"Ns.",
        b"\x80\x02" + b"]q\0" + b"h\0a" * 200_000 + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02" + b"(" * 500_000 + b"t" * 500_000 + b".",
        b"\x80\x02u.",
        b"\x80\x02h\5.",
        b"",
    ],
    ids=["values", "key", "list of itself", "long number", "marks", "no stack", "no memo", "empty"],
)
def test_pickle_of_nonsense_is_refused_in_time(tmp_path: Path, pickled: bytes):
    refused(archive(tmp_path / "a.pt", pickled), "complete torch file|not a flat dictionary")


def test_storage_that_is_cut_short_is_refused(tmp_path: Path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(8)}, buffer)
    with zipfile.ZipFile(buffer) as source:
        members = {n.split("/", 1)[1]: source.read(n) for n in source.namelist()}
    members["data/0"] = members["data/0"][:16]
    pickled = members.pop("data.pkl")
    members.pop("version")
    refused(archive(tmp_path / "a.pt", pickled, **members), "a storage is cut short")
