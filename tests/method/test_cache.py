"""A reference cache is an immutable value that survives its file."""

import copy
import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamcache_core.errors import FileFormatError, InputError, MismatchError, StateError
from dreamcache_core.files.tensor_file import read_tensor_file, write_tensor_file
from dreamcache_core.method.adapter import AdapterInfo, AdapterSet
from dreamcache_core.method.blending import ReferenceUse
from dreamcache_core.method.cache import ReferenceCache
from dreamcache_core.method.capture import cache_from_features
from dreamcache_core.method.tokens import subject_tokens

SHAPES = {"middle_block.1": (12, 2, 3), "output_blocks.4.1": (8, 4, 6)}


def make_cache(references: int = 2, noise: int = 0, **changes: Any) -> ReferenceCache:
    generator = torch.Generator().manual_seed(noise)
    settings: dict[str, Any] = {
        "features": {
            name: torch.randn(references, *shape, generator=generator)
            for name, shape in SHAPES.items()
        },
        "context_width": 48,
        "latent_size": (16, 24),
        "timestep": 1,
        "seed": 5,
        **changes,
    }
    return ReferenceCache(**settings)


def make_masks(references: int = 2) -> dict[str, Tensor]:
    masks = {
        name: torch.zeros(references, *shape[1:], dtype=torch.bool)
        for name, shape in SHAPES.items()
    }
    for mask in masks.values():
        mask[:, 1, 1:] = True
    return masks


def assert_same(cache: ReferenceCache, other: ReferenceCache) -> None:
    assert cache.layers == other.layers
    for name, feature in cache.features.items():
        assert feature.dtype == other.features[name].dtype
        assert torch.equal(feature, other.features[name])
    assert (cache.masks is None) == (other.masks is None)
    for name, mask in (cache.masks or {}).items():
        assert torch.equal(mask, (other.masks or {})[name])
    for field in ("context_width", "latent_size", "timestep", "seed", "thumbnails"):
        assert getattr(cache, field) == getattr(other, field)


# a value


def test_fields_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_cache().timestep = 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("field", ["features", "masks"])
def test_mappings_cannot_be_changed(field: str):
    mapping: Any = getattr(make_cache(masks=make_masks()), field)
    with pytest.raises(TypeError, match="does not support item assignment"):
        mapping["middle_block.1"] = torch.zeros(1)


def to_and_from_torch_save(value: Any) -> Any:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("masks", [None, make_masks()], ids=["without masks", "with masks"])
@pytest.mark.parametrize(
    "copied",
    [lambda value: pickle.loads(pickle.dumps(value)), to_and_from_torch_save, copy.copy],
    ids=["pickle", "torch.save", "copy"],
)
def test_pickled_cache_and_its_use_come_back_the_same(masks: Any, copied: Any):
    cache = make_cache(masks=masks)
    assert_same(copied(cache), cache)
    use = ReferenceUse(cache, AdapterSet(AdapterInfo(cache.layout)), 0.5, torch.ones(4, 6).tril())
    again = copied(use)
    assert_same(again.reference, cache)
    assert again.adapters.info == use.adapters.info
    for name, weight in use.adapters.state_dict().items():
        assert torch.equal(again.adapters.state_dict()[name], weight)
    assert again.scale == 0.5
    assert torch.equal(again.regions, use.regions)


def test_changing_the_dictionary_it_was_made_of_changes_nothing():
    features = {name: torch.zeros(1, *shape) for name, shape in SHAPES.items()}
    cache = make_cache(features=features)
    features.clear()
    assert cache.layers == tuple(SHAPES)


def test_properties_describe_the_references():
    cache = make_cache()
    assert cache.num_references == 2
    assert cache.layers == tuple(SHAPES)
    assert dict(cache.layout.channels) == {"middle_block.1": 12, "output_blocks.4.1": 8}
    assert cache.family == "custom-48"


def test_description_says_what_people_ask_for():
    cache = make_cache()
    assert cache.describe() == "2 images, 192 x 128, a custom model (text width 48), 0.1 MB"
    of_sd = dataclasses.replace(cache, context_width=1024, timestep=300)
    assert of_sd.describe() == "2 images, 192 x 128, SD 2.1, 0.1 MB, timestep 300"
    assert make_cache(1).describe().startswith("1 image, ")


def test_bytes_count_features_and_masks():
    values = 2 * (12 * 2 * 3 + 8 * 4 * 6)
    tokens = 2 * (2 * 3 + 4 * 6)
    assert make_cache().nbytes == 4 * values
    assert make_cache(masks=make_masks()).nbytes == 4 * values + tokens
    assert make_cache().get_ram_usage() == make_cache().nbytes


def test_reference_of_512_pixels_takes_6_mb_in_half_precision():
    widths = {"a": (1280, 8), "b": (1280, 16), "c": (640, 32), "d": (640, 32), "e": (320, 64)}
    features = {
        name: torch.empty(1, width, side, side, dtype=torch.float16, device="meta")
        for name, (width, side) in widths.items()
    }
    cache = make_cache(features=features, latent_size=(64, 64))
    assert cache.nbytes == pytest.approx(2 * 3.03e6, rel=0.01)


def test_deep_copy_is_the_same_object():
    cache = make_cache()
    assert copy.deepcopy(cache) is cache
    assert copy.deepcopy({"nested": [cache]})["nested"][0] is cache


def test_conversion_returns_a_new_object_and_leaves_the_old():
    cache = make_cache(masks=make_masks())
    half = cache.to(dtype=torch.float16)
    assert half is not cache
    assert {f.dtype for f in half.features.values()} == {torch.float16}
    assert {f.dtype for f in cache.features.values()} == {torch.float32}
    assert half.masks is not None
    assert {m.dtype for m in half.masks.values()} == {torch.bool}
    assert_same(half.to(dtype=torch.float32).to(dtype=torch.float16), half)


def test_conversion_moves_features_and_masks_to_the_device():
    moved = make_cache(masks=make_masks())
    # an empty mask cannot be told from a full one on the meta device, so without masks there
    assert {f.device.type for f in moved.to("cpu").features.values()} == {"cpu"}
    assert {f.device.type for f in make_cache().to("meta").features.values()} == {"meta"}


def test_each_reference_keeps_its_thumbnail(tmp_path: Path):
    cache = make_cache(thumbnails=(b"one", b"two"))
    cache.save(tmp_path / "reference.safetensors")
    assert_same(ReferenceCache.load(tmp_path / "reference.safetensors"), cache)
    parts = cache.split()
    assert [part.thumbnails for part in parts] == [(b"one",), (b"two",)]
    assert ReferenceCache.concatenate(parts[::-1]).thumbnails == (b"two", b"one")
    # from a file of before there were any: better none than those of other images
    assert ReferenceCache.concatenate([*parts, make_cache(1)]).thumbnails == ()


def test_there_are_as_many_thumbnails_as_references_or_none():
    with pytest.raises(InputError, match="1 thumbnails for 2 references"):
        make_cache(thumbnails=(b"one",))


# bad input


@pytest.mark.parametrize(
    "features",
    [
        {"a": torch.zeros(1, 4, 2)},
        {"a": torch.zeros(4, 2, 2)},
        {"a": torch.zeros(1, 4, 2, 2), "b": torch.zeros(2, 4, 2, 2)},
        {"a": torch.zeros(0, 4, 2, 2)},
        {"a": torch.zeros(1, 4, 0, 2)},
    ],
    ids=["three axes", "no reference axis", "differing counts", "no reference", "no token"],
)
def test_misshapen_features_are_refused(features: dict[str, Tensor]):
    with pytest.raises(InputError, match=r"must be \(references, channels, height, width\)"):
        make_cache(features=features)


def test_cache_without_layers_is_refused():
    with pytest.raises(InputError, match="at least one layer; none was given"):
        make_cache(features={})


@pytest.mark.parametrize("change", ["another size", "float", "a layer missing", "none at all"])
def test_masks_that_do_not_fit_the_features_are_refused(change: str):
    masks = make_masks()
    if change == "another size":
        masks["middle_block.1"] = masks["middle_block.1"].transpose(1, 2)
    elif change == "float":
        masks = {name: mask.float() for name, mask in masks.items()}
    elif change == "a layer missing":
        del masks["middle_block.1"]
    else:
        masks = {}
    with pytest.raises(InputError, match="Masks must be bool of shapes"):
        make_cache(masks=masks)


@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)], ids=["every", "one of two"])
def test_empty_mask_of_any_reference_is_refused(rows: slice):
    masks = make_masks()
    masks["middle_block.1"][rows] = False
    with pytest.raises(InputError, match="at least one token of the subject"):
        make_cache(masks=masks)


# several references


def test_concatenation_keeps_the_order_of_references():
    one, two = make_cache(1, 1), make_cache(2, 2)
    both = ReferenceCache.concatenate([one, two])
    assert both.num_references == 3
    for name in SHAPES:
        assert torch.equal(both.features[name][:1], one.features[name])
        assert torch.equal(both.features[name][1:], two.features[name])
    assert both.latent_size == (16, 24)
    assert both.masks is None


def test_concatenation_of_one_equals_it():
    cache = make_cache(masks=make_masks())
    assert_same(ReferenceCache.concatenate([cache]), cache)


def test_concatenation_fills_missing_masks_with_ones():
    masked = make_cache(masks=make_masks())
    both = ReferenceCache.concatenate([make_cache(1), masked])
    assert both.masks is not None
    for name, mask in both.masks.items():
        assert bool(mask[0].all())
        assert torch.equal(mask[1:], make_masks()[name])


@pytest.mark.parametrize(("other", "joint"), [(5, 5), (6, None), (None, None)])
def test_seed_of_a_concatenation_is_that_of_all_or_none(other: int | None, joint: int | None):
    both = ReferenceCache.concatenate([make_cache(), make_cache(seed=5), make_cache()])
    assert both.seed == 5
    changed = dataclasses.replace(make_cache(), seed=other)
    assert ReferenceCache.concatenate([make_cache(), changed]).seed == joint


@pytest.mark.parametrize("masked", [False, True])
def test_splitting_undoes_concatenation(masked: bool):
    one, two = (make_cache(1, noise, masks=make_masks(1) if masked else None) for noise in (1, 2))
    parts = ReferenceCache.concatenate([one, two]).split()
    assert len(parts) == 2
    for part, whole in zip(parts, (one, two), strict=True):
        assert_same(part, whole)


def test_rounding_error_is_that_of_the_worst_layer_by_hand():
    cache = make_cache()
    by_hand = [
        ((f.bfloat16().float() - f).square().mean() / f.square().mean()).sqrt().item()
        for f in cache.features.values()
    ]
    assert cache.rounding_error(torch.bfloat16) == pytest.approx(max(by_hand), rel=1e-4)
    assert cache.rounding_error(torch.float32) == 0
    assert 1e-4 < cache.rounding_error(torch.float16) < 4e-4


def test_rounding_beyond_a_types_range_is_infinite():
    cache = make_cache(features={"middle_block.1": torch.full((1, 4, 2, 2), 1e6)})
    assert cache.rounding_error(torch.float16) == float("inf")
    assert cache.rounding_error(torch.bfloat16) < 1e-2


def test_concatenation_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one reference"):
        ReferenceCache.concatenate([])


def test_other_latent_sizes_are_refused_and_both_are_named():
    features = {name: f.transpose(2, 3) for name, f in make_cache().features.items()}
    turned = make_cache(features=features, latent_size=(24, 16))
    with pytest.raises(MismatchError, match=r"References 1 and 3 .*192 x 128.*128 x 192"):
        ReferenceCache.concatenate([make_cache(), make_cache(), turned])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"context_width": 768}, r"text width 48.*SD 1.5"),
        ({"timestep": 3}, r"0.1 MB; .*timestep 3"),
        ({"features": {"middle_block.1": torch.zeros(1, 12, 2, 3)}}, "of other layers"),
    ],
    ids=["model", "timestep", "layers"],
)
def test_references_of_another_kind_are_refused_and_both_are_named(
    change: dict[str, Any], named: str
):
    with pytest.raises(MismatchError, match=named):
        ReferenceCache.concatenate([make_cache(), make_cache(**change)])


# from features and an image's mask


def test_passes_become_references_in_order():
    passes = [dict(make_cache(1, seed).features) for seed in (1, 2)]
    cache = cache_from_features(passes, 48, (16, 24), 1, None)
    for name in SHAPES:
        assert torch.equal(cache.features[name], torch.cat([p[name] for p in passes]))
    assert cache.seed is None


@pytest.mark.parametrize("passes", [[], [{}]], ids=["no pass", "a pass that read nothing"])
def test_passes_without_features_are_refused(passes: list[dict[str, Tensor]]):
    with pytest.raises(StateError, match="not called inside capture_features"):
        cache_from_features(passes, 48, (16, 24), 1, None)


def test_mask_of_an_image_becomes_tokens_of_every_layer():
    mask = torch.zeros(2, 32, 48)
    mask[0, :16] = 1  # upper half
    mask[1, :, 32:] = 1  # right third
    passes = [dict(make_cache(1, seed).features) for seed in (1, 2)]
    masks = cache_from_features(passes, 48, (16, 24), 1, None, mask).masks
    assert masks is not None
    assert masks["middle_block.1"].tolist() == [
        [[True, True, True], [False, False, False]],
        [[False, False, True], [False, False, True]],
    ]
    assert masks["output_blocks.4.1"][1].sum() == 4 * 2


def test_subject_too_thin_for_half_a_token_keeps_its_fullest_token():
    mask = torch.zeros(1, 32, 48)
    mask[0, 20, 20] = 1
    assert subject_tokens(mask, 2, 3).tolist() == [[[False, False, False], [False, True, False]]]


def test_empty_mask_of_an_image_is_refused():
    with pytest.raises(InputError, match="mask of a reference is empty"):
        subject_tokens(torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]), 2, 2)


# files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_file_round_trip_gives_an_equal_cache(tmp_path: Path, dtype: torch.dtype, masked: bool):
    masks = make_masks() if masked else None
    cache = make_cache(masks=masks, seed=None, timestep=3).to(dtype=dtype)
    cache.save(tmp_path / "r.safetensors")
    assert_same(ReferenceCache.load(tmp_path / "r.safetensors"), cache)


def test_layers_that_share_memory_are_saved(tmp_path: Path):
    feature = torch.rand(1, 4, 2, 2)
    cache = make_cache(features={"middle_block.1": feature, "output_blocks.4.1": feature})
    cache.save(tmp_path / "r.safetensors")
    assert_same(ReferenceCache.load(tmp_path / "r.safetensors"), cache)


def test_views_are_saved_without_what_surrounds_them(tmp_path: Path):
    features = {n: f[1:2].transpose(2, 3) for n, f in make_cache(100).features.items()}
    cache = make_cache(features=features)
    cache.save(tmp_path / "r.safetensors")
    assert_same(ReferenceCache.load(tmp_path / "r.safetensors"), cache)
    assert (tmp_path / "r.safetensors").stat().st_size < cache.nbytes + 2000


def test_loaded_cache_does_not_change_when_its_file_is_written_to(tmp_path: Path):
    path, cache = tmp_path / "r.safetensors", make_cache()
    cache.save(path)
    loaded = ReferenceCache.load(path)
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size - 64)
        stream.write(bytes(64))
    assert_same(loaded, cache)


def test_cache_may_be_saved_over_its_own_file(tmp_path: Path):
    path = tmp_path / "r.safetensors"
    make_cache().save(path)
    loaded = ReferenceCache.load(path)
    loaded.save(path)
    assert_same(ReferenceCache.load(path), make_cache())


def test_saving_to_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"Cannot write .*r\.safetensors: No such file"):
        make_cache().save(tmp_path / "missing" / "r.safetensors")


def test_missing_reference_file_is_named(tmp_path: Path):
    with pytest.raises(FileFormatError, match=r"no readable file .*r\.safetensors"):
        ReferenceCache.load(tmp_path / "r.safetensors")


STRANGE_LAYERS = (
    "<img src=x onerror=alert(1)>",
    "output_blocks.4.1\nwarning: all is well",
    "output_blocks.4.1\x1b[2J",
    "output_blocks.\u0664.1",
    "../output_blocks.4.1",
    "output_blocks.4444.1",
    "",
)


@pytest.mark.parametrize("layer", STRANGE_LAYERS)
def test_reference_with_a_name_that_is_no_layer_is_refused_on_one_line(tmp_path: Path, layer: str):
    path = tmp_path / "a.safetensors"
    make_cache(features={layer: torch.zeros(1, 2, 2, 3)}).save(path)
    with pytest.raises(
        FileFormatError, match=r"not a complete saved reference .unknown layer"
    ) as e:
        ReferenceCache.load(path)
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"timestep": -5},
        {"timestep": 2048},
        {"context_width": 0},
        {"features": {name: torch.ones(2, *s, dtype=torch.int32) for name, s in SHAPES.items()}},
    ],
    ids=["timestep", "late timestep", "width", "integers"],
)
def test_values_that_no_model_has_are_refused(change: dict[str, Any]):
    with pytest.raises(
        InputError, match=r"timestep must be|context_width must be|width\), float, with"
    ):
        make_cache(**change)


def rewritten(path: Path, tensors: dict[str, Tensor] | None = None, **entries: str) -> Path:
    """Save a reference with other contents, and the checksum of these."""
    make_cache().save(path)
    stored, metadata = read_tensor_file(path, "reference/1")
    del metadata["sha256"]
    write_tensor_file(path, {**stored, **(tensors or {})}, {**metadata, **entries})
    return path


@pytest.mark.parametrize(
    ("entries", "value"),
    [
        ({}, torch.nan),
        ({}, torch.inf),
        ({"timestep": "-5"}, 0.0),
        ({"timestep": "2048"}, 0.0),
        ({"context_width": "0"}, 0.0),
        ({"seed": '["a"]'}, 0.0),
        ({"layers": "[" * 100_000}, 0.0),
        ({"latent_size": '{"a": 1}'}, 0.0),
        ({"latent_size": "[Infinity, 1]"}, 0.0),
        ({"latent_size": "[-5, 24]"}, 0.0),
        ({"latent_size": "[1, 1]"}, 0.0),
        ({"seed": "true"}, 0.0),
        ({"timestep": "1" + "0" * 400}, 0.0),
    ],
)
def test_own_file_with_the_right_checksum_of_nonsense_is_refused(
    tmp_path: Path, entries: dict[str, str], value: float
):
    tensors = {"features.middle_block.1": torch.full((2, *SHAPES["middle_block.1"]), value)}
    path = rewritten(tmp_path / "a.safetensors", tensors, **entries)
    with pytest.raises(FileFormatError, match="not a complete saved reference"):
        ReferenceCache.load(path)
