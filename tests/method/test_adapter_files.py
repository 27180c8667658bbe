"""Adapter files in and out: what is read, and what each wrong file is told to be."""

import dataclasses
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dreamcache_core.errors import DreamCacheError, FileFormatError, InputError
from dreamcache_core.files.tensor_file import read_tensor_file, write_tensor_file
from dreamcache_core.method.adapter import AdapterInfo, AdapterSet
from dreamcache_core.method.adapter_files import (
    adapters_from_released,
    load_adapters,
    save_adapters,
)
from dreamcache_core.method.cache import ReferenceCache
from dreamcache_core.method.layers import Layout

CHANNELS = {
    "middle_block.1": 16,
    "output_blocks.4.1": 16,
    "output_blocks.6.1": 8,
    "output_blocks.8.1": 8,
    "output_blocks.10.1": 4,
}
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
OWN_NAME = {
    "attn_mem.to_q.weight": "to_q.weight",
    "attn_mem.to_k.weight": "to_k.weight",
    "attn_mem.to_v.weight": "to_v.weight",
    "attn_mem.to_out.0.weight": "to_out.weight",
    "attn_mem.to_out.0.bias": "to_out.bias",
    "norm2_mem.weight": "norm.weight",
    "norm2_mem.bias": "norm.bias",
    "linear_cat.weight": "merge.weight",
    "linear_cat.bias": "merge.bias",
}
TO_Q = "diffusion_model.middle_block.1.transformer_blocks.0.attn_mem.to_q.weight"
NORM = "diffusion_model.output_blocks.10.1.transformer_blocks.0.norm2_mem.weight"


def make_adapters(width: int = 1024, **info: Any) -> AdapterSet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapters = AdapterSet(AdapterInfo(Layout(width, CHANNELS), **info))
        for parameter in adapters.parameters():
            parameter.data = torch.randn_like(parameter)
        return adapters.requires_grad_(False)


def released(
    prefix: str = "diffusion_model.", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The state dict that the authors' training saves: 45 tensors."""
    adapters = make_adapters()
    state = {
        f"{prefix}{layer}.transformer_blocks.0.{name}": adapters[layer].state_dict()[own].to(dtype)
        for layer in reversed(CHANNELS)
        for name, own in OWN_NAME.items()
    }
    assert len(state) == 45
    return state


def store(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def assert_equal_weights(adapters: AdapterSet, expected: AdapterSet) -> None:
    assert adapters.layers == expected.layers
    state = expected.state_dict()
    assert set(adapters.state_dict()) == set(state)
    for key, value in adapters.state_dict().items():
        assert torch.equal(value, state[key]), key


# our format


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_own_format_round_trip(tmp_path: Path, dtype: torch.dtype | None):
    info = {"timestep": 3, "base_model": "a base", "prediction": "v_prediction"}
    adapters = make_adapters(768, **info, extra={"licence": "CC0", "steps": "7"})
    save_adapters(adapters, tmp_path / "a.safetensors", dtype=dtype)
    loaded = load_adapters(tmp_path / "a.safetensors")
    assert_equal_weights(loaded, adapters.to(dtype or torch.float32).float())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.info == adapters.info
    assert loaded.family == "sd15"


def test_every_field_of_the_information_is_stored(tmp_path: Path):
    adapters = make_adapters(48, timestep=9, base_model="b", prediction="c", extra={"d": "e"})
    save_adapters(adapters, tmp_path / "a.safetensors")
    info = dataclasses.asdict(load_adapters(tmp_path / "a.safetensors").info)
    assert info == dataclasses.asdict(adapters.info)


def test_family_of_own_format_is_its_own(tmp_path: Path):
    save_adapters(make_adapters(768), tmp_path / "a.safetensors")
    assert load_adapters(tmp_path / "a.safetensors", family="sdxl").family == "sd15"


def test_own_format_is_read_whatever_its_suffix(tmp_path: Path):
    save_adapters(make_adapters(), tmp_path / "a.pt")
    assert_equal_weights(load_adapters(tmp_path / "a.pt"), make_adapters())


def test_saving_half_precision_leaves_the_adapters_alone(tmp_path: Path):
    adapters = make_adapters()
    save_adapters(adapters, tmp_path / "a.safetensors", dtype=torch.float16)
    assert_equal_weights(adapters, make_adapters())


def test_failed_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.safetensors"
    save_adapters(make_adapters(), path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=r"Cannot write .*a\.safetensors: Permission denied"):
        save_adapters(make_adapters(768), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_fused_adapters_are_not_saved(tmp_path: Path):
    fused: Any = make_adapters().fuse()
    with pytest.raises(InputError, match="Expected an AdapterSet, given FusedAdapterSet"):
        save_adapters(fused, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("problem", ["missing", "unknown", "misshapen"])
def test_own_format_with_wrong_tensors_lists_them(tmp_path: Path, problem: str):
    path = tmp_path / "a.safetensors"
    adapters = make_adapters()
    tensors = {
        f"{layer}.{name}": value
        for layer in CHANNELS
        for name, value in adapters[layer].state_dict().items()
    }
    if problem == "missing":
        del tensors["middle_block.1.to_q.weight"]
    elif problem == "unknown":
        tensors["middle_block.1.to_z.weight"] = torch.zeros(2)
    else:
        tensors["middle_block.1.to_q.weight"] = torch.zeros(2, 3)
    layers = '["middle_block.1","output_blocks.4.1","output_blocks.6.1","output_blocks.8.1","output_blocks.10.1"]'
    write_tensor_file(
        path, tensors, {"format": "adapters/1", "context_width": "768", "layers": layers}
    )
    with pytest.raises(FileFormatError, match=rf"1 {problem}: middle_block\.1\.to_[qz]\.weight"):
        load_adapters(path)


@pytest.mark.parametrize(
    "layer", ["<img src=x onerror=alert(1)>", "middle_block.1\n", "middle_block.\u0661", "a" * 999]
)
def test_adapters_with_a_name_that_is_no_layer_are_refused_on_one_line(tmp_path: Path, layer: str):
    path = tmp_path / "a.safetensors"
    entries = {"format": "adapters/1", "context_width": "768", "layers": json.dumps([layer])}
    write_tensor_file(path, {f"{layer}.norm.weight": torch.zeros(4)}, entries)
    with pytest.raises(FileFormatError, match="unknown layer") as error:
        load_adapters(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_what_a_file_says_of_its_base_model_is_printable(tmp_path: Path):
    save_adapters(
        make_adapters(base_model="a\nwarning: b", prediction="\x1b[2J"), tmp_path / "a.pt"
    )
    info = load_adapters(tmp_path / "a.pt").info
    assert (info.base_model, info.prediction) == (r"a\nwarning: b", r"\x1b[2J")


@pytest.mark.parametrize(
    "entries",
    [
        *({"timestep": "-5"}, {"timestep": "2048"}, {"timestep": "1" + "0" * 400}),
        *({"context_width": "0"}, {"context_width": "1" + "0" * 400}, {"layers": "[" * 99999}),
    ],
)
def test_own_file_with_the_right_checksum_of_nonsense_is_refused(
    tmp_path: Path, entries: dict[str, str]
):
    path = tmp_path / "a.safetensors"
    save_adapters(make_adapters(), path)
    tensors, metadata = read_tensor_file(path, "adapters/1")
    del metadata["sha256"]
    write_tensor_file(path, tensors, {**metadata, **entries})
    with pytest.raises(FileFormatError, match="lacks a valid metadata entry"):
        load_adapters(path)


# the released format


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_released_file_is_read(tmp_path: Path, prefix: str, dtype: torch.dtype, suffix: str):
    adapters = load_adapters(store(released(prefix, dtype), tmp_path / f"a{suffix}"))
    assert_equal_weights(adapters, make_adapters().to(dtype).float())
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    assert adapters.info.layout == Layout(1024, CHANNELS)


def test_released_file_in_the_older_torch_format_is_read(tmp_path: Path):
    torch.save(released(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_equal_weights(load_adapters(tmp_path / "a.pt"), make_adapters())


def test_released_file_converts_to_own_format_and_back(tmp_path: Path):
    adapters = load_adapters(store(released(), tmp_path / "a.pt"))
    save_adapters(adapters, tmp_path / "a.safetensors")
    again = load_adapters(tmp_path / "a.safetensors")
    assert_equal_weights(again, make_adapters())
    assert again.info == adapters.info


def test_every_released_key_lands_on_one_tensor_of_its_own():
    adapters = adapters_from_released(released())
    for layer in CHANNELS:
        own = adapters[layer].state_dict()
        assert sorted(own) == sorted(OWN_NAME.values())
        for name, own_name in OWN_NAME.items():
            key = f"diffusion_model.{layer}.transformer_blocks.0.{name}"
            assert torch.equal(own[own_name], released()[key])


def test_layers_come_in_execution_order_whatever_the_file_says():
    state = released()
    turned = dict(sorted(state.items(), reverse=True))
    assert adapters_from_released(turned).layers == tuple(CHANNELS)


def test_released_file_counts_as_sd21_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="dreamcache_core"):
        adapters = load_adapters(store(released(), tmp_path / "a.pt"))
    assert adapters.family == "sd21"
    assert "a.pt carries no model family: it counts as sd21" in caplog.text


@pytest.mark.parametrize(
    ("family", "width"), [("sd15", 768), ("sd21", 1024), ("sdxl", 2048), ("custom-48", 48)]
)
def test_given_family_overrides_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, width: int
):
    with caplog.at_level(logging.INFO, logger="dreamcache_core"):
        adapters = load_adapters(store(released(), tmp_path / "a.pt"), family=family)
    assert adapters.family == family
    assert adapters.info.layout.context_width == width
    assert not caplog.records


@pytest.mark.parametrize("family", ["sd3", "SD21", "", "custom-", "custom-x"])
def test_unknown_family_is_refused(tmp_path: Path, family: str):
    path = store(released(), tmp_path / "a.pt")
    with pytest.raises(InputError, match=rf"Unknown family '{family}'. Give sd15, sd21, sdxl"):
        load_adapters(path, family=family)


def test_mixed_prefixes_are_refused():
    state = {**released(""), **released("diffusion_model.")}
    with pytest.raises(FileFormatError, match=r"several prefixes \('', 'diffusion_model\.'\)"):
        adapters_from_released(state)


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ({TO_Q: None}, r"Tensors 1 missing: middle_block\.1\.to_q\.weight"),
        ({NORM: None}, r"Tensors 1 missing: output_blocks\.10\.1\.norm\.weight\."),
        ({NORM: None, TO_Q: None}, r"Tensors 2 missing: middle_block\.1\.to_q\.weight, output"),
        ({NORM.replace("10.1", "11.1"): torch.zeros(4)}, r"Tensors 8 missing: output_blocks\.11"),
        ({f"{TO_Q}s": torch.zeros(2)}, r"Tensors 1 unknown: .*attn_mem\.to_q\.weights"),
        ({"alpha": torch.zeros(2)}, r"Tensors 1 unknown: alpha"),
        ({TO_Q: torch.zeros(16, 8)}, r"1 misshapen: .*to_q\.weight \(16, 8\), expected \(16, 16\)"),
        ({TO_Q: torch.zeros(16)}, r"1 misshapen: .*to_q\.weight \(16,\), expected \(16, 16\)"),
        ({TO_Q: torch.tensor(1.0)}, r"1 misshapen: .*to_q\.weight \(\), expected \(16, 16\)"),
        ({NORM: torch.zeros(5)}, r"1 misshapen: .*norm\.weight \(5,\), expected \(4,\)\."),
        ({NORM: torch.zeros(0)}, r"1 misshapen: .*norm\.weight \(0,\), expected \(4,\)\."),
        ({NORM: torch.full((4,), torch.nan)}, r"1 with NaN or infinite values: .*norm\.weight"),
        ({NORM: torch.full((4,), -torch.inf)}, r"1 with NaN or infinite values: .*norm\.weight"),
        ({NORM: torch.ones(4, dtype=torch.int32)}, r"1 not of a float type: .*norm\.weight"),
        ({NORM: torch.ones(4, dtype=torch.bool)}, r"1 not of a float type: .*norm\.weight"),
        ({NORM: torch.ones(4, dtype=torch.complex64)}, r"1 not of a float type: .*norm\.weight"),
    ],
)
def test_wrong_tensors_are_listed(change: dict[str, Tensor | None], listed: str):
    state = {**released(), **change}
    present = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(FileFormatError, match=listed):
        adapters_from_released(present)


def test_problems_of_all_kinds_are_listed_together_and_long_lists_shortened():
    state = released()
    for name in list(OWN_NAME)[1:]:
        del state[f"diffusion_model.middle_block.1.transformer_blocks.0.{name}"]
    state["a"], state[NORM] = torch.zeros(1), torch.zeros(3)
    with pytest.raises(FileFormatError, match=r"8 missing: .* and 2 more; 1 unknown: .*; 1 mis"):
        adapters_from_released(state)


def test_layer_without_its_norm_is_reported_as_missing_only():
    state = released()
    for name in ("norm2_mem.weight", "norm2_mem.bias"):
        del state[f"diffusion_model.middle_block.1.transformer_blocks.0.{name}"]
    with pytest.raises(FileFormatError, match="2 missing") as error:
        adapters_from_released(state)
    assert "misshapen" not in str(error.value)


# files that are something else


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"<!doctype html><html><body>Sign in</body></html>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"", r"is empty \(0 bytes\)"),
        (bytes(512), "is not a complete safetensors file"),
        (b"PK\x03\x04" + bytes(50), "is not a complete torch file"),
        (b"\x80\x04garbage", "is not a complete torch file"),
    ],
    ids=["web page", "LFS pointer", "empty", "zeros", "zip head", "pickle head"],
)
def test_file_without_weights_is_named(tmp_path: Path, content: bytes, named: str, suffix: str):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=rf"a{suffix} {named}"):
        load_adapters(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated_file_is_named(tmp_path: Path, suffix: str, share: float):
    path = store(released(), tmp_path / f"a{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FileFormatError, match=r"not a complete (torch|safetensors) file"):
        load_adapters(path)


def test_flipped_byte_in_a_torch_archive_is_found(tmp_path: Path):
    path = store(released(), tmp_path / "a.pt")
    content = bytearray(path.read_bytes())
    content[content.index(released()[TO_Q].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"damaged at|not a complete torch file"):
        load_adapters(path)


class Harmful:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["archive", "older format", "bare pickle", "newer pickle"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, form: str):
    path, harm = tmp_path / "a.pt", Harmful(tmp_path / "harmed")
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(harm, protocol=2))
    elif form == "newer pickle":
        path.write_bytes(pickle.dumps(harm))
    else:
        torch.save({"a": harm}, path, _use_new_zipfile_serialization=form == "archive")
    named = "complete torch file" if form == "newer pickle" else "could run code; it was not read"
    with pytest.raises(FileFormatError, match=named):
        load_adapters(path)
    assert not harm.path.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state_dict": {"a": torch.zeros(1)}, "step": 3}, "other weights.*found state_dict, step"),
        ({"adapters": released()}, "DreamCache adapters as the authors released them, not a flat"),
        ({"image_proj": {"p": torch.ones(1)}, "ip_adapter": {"1.to_k_ip.weight": 1}}, "IP-Adapter"),
        (
            {"state_dict": {"model.diffusion_model.a": torch.ones(1)}},
            r"a base model \(checkpoint\)",
        ),
        ([torch.zeros(1)], r"not a flat dictionary of tensors \(found list\)"),
        (torch.zeros(1), r"not a flat dictionary of tensors \(found Tensor\)"),
        ({}, "not DreamCache adapters"),
    ],
    ids=["nested", "nested adapters", "IP-Adapter", "checkpoint", "list", "tensor", "nothing"],
)
def test_torch_file_of_another_structure_is_named(tmp_path: Path, content: Any, named: str):
    with pytest.raises(FileFormatError, match=named):
        load_adapters(store(content, tmp_path / "a.pt"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"], "a base model"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a base model"),
        (["lora_unet_down_blocks_0_proj.lora_up.weight", "x.alpha"], "a LoRA"),
        (["unet.mid_block.attentions.0.to_q.lora_A.weight"], "a LoRA"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["control_model.zero_convs.0.0.weight"], "a ControlNet"),
        (["double_blocks.0.img_attn.qkv.weight"], "a base model"),
        (["something"], "a file of other weights"),
    ],
)
def test_other_weights_are_named_and_the_right_ones_described(
    tmp_path: Path, keys: list[str], kind: str, suffix: str
):
    path = store({key: torch.zeros(2) for key in keys}, tmp_path / f"a{suffix}")
    match = rf"a{suffix} is {kind}.*, not DreamCache adapters\. .*cross_attention-<step>\.pt"
    with pytest.raises(FileFormatError, match=match):
        load_adapters(path)


def test_reference_in_place_of_adapters_is_named(tmp_path: Path):
    features = {name: torch.zeros(1, width, 2, 3) for name, width in CHANNELS.items()}
    ReferenceCache(features, 1024, (16, 24)).save(tmp_path / "r.safetensors")
    with pytest.raises(FileFormatError, match=r"reference/1; expected .* adapters/1"):
        load_adapters(tmp_path / "r.safetensors")


def test_adapters_in_place_of_a_reference_are_named(tmp_path: Path):
    save_adapters(make_adapters(), tmp_path / "a.safetensors")
    with pytest.raises(FileFormatError, match=r"adapters/1; expected .* reference/1"):
        ReferenceCache.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_released_adapters_in_place_of_a_reference_are_named(tmp_path: Path, suffix: str):
    named = "a torch file" if suffix == ".pt" else "DreamCache adapters as the authors released"
    with pytest.raises(FileFormatError, match=named):
        ReferenceCache.load(store(released(), tmp_path / f"a{suffix}"))


@pytest.mark.parametrize("path", ["missing.pt", "."])
def test_missing_file_or_folder_is_named(tmp_path: Path, path: str):
    with pytest.raises(DreamCacheError, match="no readable file"):
        load_adapters(tmp_path / path)
