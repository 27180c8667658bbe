"""Files with a checksum: whatever happens to their bytes, they load equal values or say what is wrong."""

import json
import os
import stat
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamcache_core.errors import DreamCacheError, FileFormatError, InputError
from dreamcache_core.files.tensor_file import (
    kind_of_weights,
    read_header,
    read_tensor_file,
    read_weights,
    write_tensor_file,
)
from dreamcache_core.files.torch_file import is_torch_file
from dreamcache_core.method.adapter import AdapterInfo, AdapterSet
from dreamcache_core.method.adapter_files import load_adapters, save_adapters
from dreamcache_core.method.cache import ReferenceCache
from dreamcache_core.method.layers import Layout

CHANNELS = {"middle_block.1": 4, "output_blocks.4.1": 2}
TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.float16)}
METADATA = {"format": "test/1", "note": "two words"}


def read_stored(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    header = read_header(path)
    return read_weights(path, header), header.entries


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# writing and reading


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.int64]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_round_trip_gives_equal_tensors_and_metadata(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
):
    path, tensor = tmp_path / "f.safetensors", torch.ones(shape).to(dtype)
    write_tensor_file(path, {"x": tensor}, METADATA)
    tensors, metadata = read_tensor_file(path, "test/1")
    assert torch.equal(tensors["x"], tensor)
    assert tensors["x"].dtype == dtype
    assert {key: metadata[key] for key in METADATA} == METADATA


def test_tensors_that_need_gradients_are_saved(tmp_path: Path):
    tensor = torch.ones(2, requires_grad=True)
    write_tensor_file(tmp_path / "f.safetensors", {"x": tensor}, METADATA)
    assert not read_tensor_file(tmp_path / "f.safetensors", "test/1")[0]["x"].requires_grad


def test_saved_file_is_plain_safetensors(tmp_path: Path):
    write_tensor_file(tmp_path / "f.safetensors", TENSORS, METADATA)
    assert set(load_file(tmp_path / "f.safetensors")) == set(TENSORS)


def test_saved_file_is_as_readable_as_any_other(tmp_path: Path):
    write_tensor_file(tmp_path / "f.safetensors", TENSORS, METADATA)
    plain = write(tmp_path / "plain", b"")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (plain, tmp_path / "f.safetensors")}
    assert len(modes) == 1


def test_nothing_but_the_file_is_left(tmp_path: Path):
    write_tensor_file(tmp_path / "f.safetensors", TENSORS, METADATA)
    assert os.listdir(tmp_path) == ["f.safetensors"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    path = tmp_path / "f.safetensors"
    write_tensor_file(path, TENSORS, METADATA)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((InputError, KeyboardInterrupt)) as raised:
        write_tensor_file(path, {}, METADATA)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["f.safetensors"]
    if isinstance(error, OSError):
        assert "No space left on device" in str(raised.value)


def test_folder_in_place_of_the_target_is_refused_and_left(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"Cannot write .*folder: Is a directory"):
        write_tensor_file(tmp_path / "folder", TENSORS, METADATA)
    assert os.listdir(tmp_path) == ["folder"]


def test_other_format_is_refused_and_both_are_named(tmp_path: Path):
    write_tensor_file(tmp_path / "f.safetensors", TENSORS, METADATA)
    with pytest.raises(FileFormatError, match=r"format test/1; expected .* of format test/2"):
        read_tensor_file(tmp_path / "f.safetensors", "test/2")


@pytest.mark.parametrize("change", ["tensor", "metadata", "name", "type", "shape", "checksum"])
def test_changed_content_does_not_pass_the_checksum(tmp_path: Path, change: str):
    path = tmp_path / "f.safetensors"
    write_tensor_file(path, TENSORS, METADATA)
    tensors, metadata = read_stored(path)
    if change == "tensor":
        tensors["b"][1, 2] += 1
    elif change == "metadata":
        metadata["dreamcache.note"] = "other words"
    elif change == "name":
        tensors["c"] = tensors.pop("b")
    elif change == "type":
        tensors["a"] = tensors["a"].view(torch.bfloat16)
    elif change == "shape":
        tensors["b"] = tensors["b"].reshape(3, 2)
    else:
        del metadata["dreamcache.sha256"]
    save_file(tensors, path, metadata)
    with pytest.raises(FileFormatError, match=r"f\.safetensors is damaged: .* checksum"):
        read_tensor_file(path, "test/1")


# files that are no weights


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty .0 bytes.: the download failed"),
        (b"<!DOCTYPE html><html>Not found</html>", "is a web page, not weights"),
        (b"\n  <HTML lang='en'>", "is a web page, not weights"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (bytes(1000), "not a complete safetensors file"),
        (b'{"error": "not found"}', "not a complete safetensors file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is an image or a document"),
        (b"abc", "not a complete safetensors file"),
        (b"PK\x03\x04" + bytes(100), "not a complete torch file"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "not a complete torch file"),
    ],
)
def test_foreign_file_is_named(tmp_path: Path, content: bytes, named: str):
    with pytest.raises(FileFormatError, match=rf"f\.safetensors .*{named}|{named}"):
        read_header(write(tmp_path / "f.safetensors", content))


@pytest.mark.parametrize("path", ["missing.safetensors", "x" * 5000, "a\0b", ""])
def test_path_that_cannot_be_read_is_named(tmp_path: Path, path: str):
    with pytest.raises(FileFormatError, match=r"no readable file .*Check the path"):
        read_header(f"{tmp_path}/{path}")


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_safetensors_whose_length_looks_like_a_torch_file_is_read(tmp_path: Path, length: int):
    path = tmp_path / "f.pt"
    save_file(TENSORS, path, {"pad": ""})
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    length += -(-max(len(header) - length, 0) // 0x10000) * 0x10000
    padded = length.to_bytes(8, "little") + header.ljust(length) + content[8 + len(header) :]
    write(path, padded)
    assert padded[:1] in (b"\x80", b"P")
    assert not is_torch_file(padded)
    assert set(read_stored(path)[0]) == set(TENSORS)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn_mem.to_q.weight", "DreamCache"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("mid_block.attentions.0.attn1.processor.to_q_lora.up.weight", "a LoRA"),
        ("lora_unet_mid_block.hada_w1_a", "a LoRA"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("image_proj.proj.weight", "an IP-Adapter"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("model.diffusion_model.input_blocks.0.0.weight", r"a base model \(checkpoint\)"),
        ("down_blocks.0.resnets.0.conv1.weight", r"a base model \(U-Net\)"),
        ("decoder.conv_in.weight", "a VAE"),
        ("text_model.embeddings.token_embedding.weight", "a text encoder"),
        ("anything", "other weights"),
    ],
)
def test_kind_of_weights_is_told_by_the_keys(tmp_path: Path, key: str, kind: str):
    save_file({key: torch.zeros(2)}, tmp_path / "f.safetensors")
    assert kind_of_weights({key}).startswith(
        kind.replace("\\", "").replace("other", "a file of other")
    )
    with pytest.raises(FileFormatError, match=rf"is .*{kind}.*; expected a DreamCache file"):
        read_tensor_file(tmp_path / "f.safetensors", "test/1")


@pytest.mark.parametrize("entries", [{}, {"dreamcache.format": "adapters/1"}])
@pytest.mark.parametrize("load", [load_adapters, ReferenceCache.load])
def test_three_gigabytes_of_another_kind_are_refused_by_their_header(
    load: Callable[[Path], Any], entries: dict[str, str], tmp_path: Path
):
    size, path = 3 * 2**30, tmp_path / "f.safetensors"
    tensor = {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": entries, "down_blocks.0.weight": tensor}).encode()
    write(path, len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)  # takes no room
    start = time.process_time()
    with pytest.raises(
        FileFormatError, match=r"a base model|expected .* reference/1|lacks a valid"
    ):
        load(path)
    assert time.process_time() - start < 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes by name")
def test_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "f.safetensors")
    with pytest.raises(FileFormatError, match=r"no readable file .*: it is no file"):
        load_adapters(tmp_path / "f.safetensors")


# property: any mutation of a valid file loads equal values or raises a DreamCacheError


def write_adapters(path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapters = AdapterSet(AdapterInfo(Layout(48, CHANNELS), extra={"licence": "none"}))
    save_adapters(adapters, path)


def write_reference(path: Path) -> None:
    values = {name: torch.rand(1, width, 2, 3) for name, width in CHANNELS.items()}
    masks = {name: torch.ones(1, 2, 3, dtype=torch.bool) for name in CHANNELS}
    ReferenceCache(values, 48, (16, 24), seed=3, masks=masks).save(path)


def write_released(path: Path) -> None:
    shapes = {"to_q": (4, 4), "to_k": (4, 4), "to_v": (4, 4), "to_out.0": (4, 4)}
    stem = "diffusion_model.middle_block.1.transformer_blocks.0"
    state = {f"{stem}.attn_mem.{name}.weight": torch.rand(s) for name, s in shapes.items()}
    state[f"{stem}.attn_mem.to_out.0.bias"] = torch.rand(4)
    state |= {f"{stem}.norm2_mem.{name}": torch.rand(4) for name in ("weight", "bias")}
    state |= {
        f"{stem}.linear_cat.weight": torch.rand(4, 8),
        f"{stem}.linear_cat.bias": torch.rand(4),
    }
    torch.save(state, path)


def adapter_values(path: Path) -> dict[str, Any]:
    adapters = load_adapters(path)
    info = adapters.info
    return {
        **adapters.state_dict(),
        "layout": (info.layout.context_width, *info.layout.channels.items()),
        "info": (info.timestep, info.base_model, info.prediction, dict(info.extra)),
    }


def reference_values(path: Path) -> dict[str, Any]:
    reference = ReferenceCache.load(path)
    return {
        **{f"features.{name}": tensor for name, tensor in reference.features.items()},
        **{f"masks.{name}": tensor for name, tensor in (reference.masks or {}).items()},
        "layers": reference.layers,
        "info": (
            reference.context_width,
            reference.latent_size,
            reference.timestep,
            reference.seed,
        ),
    }


KINDS: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], dict[str, Any]]]] = {
    "adapters": ("f.safetensors", write_adapters, adapter_values),
    "reference": ("f.safetensors", write_reference, reference_values),
    "released adapters": ("f.pt", write_released, adapter_values),
}


@cache
def valid_file(kind: str) -> tuple[bytes, dict[str, Any]]:
    name, write_it, values_of = KINDS[kind]
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_it(path)
        return path.read_bytes(), values_of(path)


def flip(content: bytes, at: int, by: int) -> bytes:
    return content[:at] + bytes([content[at] ^ by]) + content[at + 1 :]


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    size = len(content)
    header = int.from_bytes(content[:8], "little") if content[8:9] == b"{" else size
    position = st.one_of(st.integers(0, size - 1), st.integers(0, min(header + 8, size) - 1))
    few = st.integers(1, 20)
    noise = st.binary(min_size=1, max_size=20)
    return st.one_of(
        st.builds(partial(flip, content), position, st.integers(1, 255)),
        st.builds(lambda at, count: content[:at] + content[at + count :], position, few),
        st.builds(lambda at, more: content[:at] + more + content[at:], position, noise),
        st.builds(
            lambda at, more: content[:at] + more + content[at + len(more) :], position, noise
        ),
        st.builds(lambda at: content[:at], position),
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one == other


@pytest.mark.parametrize("kind", list(KINDS))
def test_any_mutation_loads_equal_values_or_raises_a_dreamcache_error(kind: str, tmp_path: Path):
    name, _, values_of = KINDS[kind]
    content, values = valid_file(kind)

    @settings(max_examples=150, deadline=None)
    @given(mutations(content))
    def check(mutated: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                loaded = values_of(write(tmp_path / name, mutated))
            except DreamCacheError:
                return
        assert set(loaded) == set(values)
        assert all(equal(loaded[key], values[key]) for key in values)

    check()


def test_released_adapters_with_a_tensor_marked_as_a_folder_are_refused(tmp_path: Path):
    name, _, values_of = KINDS["released adapters"]
    content, _ = valid_file("released adapters")
    marked = bytearray(content)
    attributes = (
        content.rindex(b"f/data/0") - 8
    )  # in the archive's list, before the offset and the name
    marked[attributes] |= 0x10  # a folder to MS-DOS: torch reads nothing there, and says nothing
    with pytest.raises(FileFormatError, match="f/data/0 is not as torch writes it"):
        values_of(write(tmp_path / name, bytes(marked)))


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_truncation_raises_a_file_format_error(kind: str, tmp_path: Path):
    name, _, values_of = KINDS[kind]
    content, _ = valid_file(kind)
    for size in {0, 1, 8, 9, 100, len(content) // 2, len(content) - 100, len(content) - 1}:
        with pytest.raises(FileFormatError, match=r"f\.(safetensors|pt)"):
            values_of(write(tmp_path / name, content[:size]))


def rewrite_metadata(path: Path, **changes: str | None) -> None:
    """Change entries and put the right checksum, as only a wrong program would."""
    tensors, metadata = read_stored(path)
    own = {key.removeprefix("dreamcache."): value for key, value in metadata.items()}
    for key, value in changes.items():
        own.pop(key, None)
        if value is not None:
            own[key] = value
    del own["sha256"]
    write_tensor_file(path, tensors, own)


@pytest.mark.parametrize("entry", ["layers", "context_width", "timestep", "latent_size", "seed"])
@pytest.mark.parametrize("value", ["", "x", "[]", "5", '["a"]', "[[]]", "[5]", "{}", "null", None])
@pytest.mark.parametrize("kind", ["adapters", "reference"])
def test_wrong_metadata_raises_a_dreamcache_error_or_is_harmless(
    kind: str, entry: str, value: str | None, tmp_path: Path
):
    name, write_it, values_of = KINDS[kind]
    path = tmp_path / name
    write_it(path)
    rewrite_metadata(path, **{entry: value})
    try:
        loaded = values_of(path)
    except FileFormatError:
        return
    assert set(loaded) == set(valid_file(kind)[1])
