"""Precomputed sets: what training reads from them is what it would compute itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_set import save_base_model, write_pairs

from dreamcache_core import DreamCacheError, InputError
from dreamcache_core.cli.main import main
from dreamcache_core.data.precomputed import encoding
from dreamcache_core.data.precomputed.encoded import EncodedSet
from dreamcache_core.data.precomputed.encoding import EncodeOptions, encode_dataset
from dreamcache_core.training import loop
from dreamcache_core.training.config import TrainConfig
from dreamcache_core.training.run import open_run

pytestmark = pytest.mark.diffusers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"), 5)


@pytest.fixture
def options(model, data, tmp_path):
    return {
        "model": str(model),
        "data": str(data),
        "out": str(tmp_path / "encoded"),
        "batch_size": 2,
        "samples_per_shard": 2,
        "dtype": "float32",
    }


def encode(options, **changes) -> EncodedSet:
    return EncodedSet(encode_dataset(EncodeOptions.from_dict({**options, **changes})))


def train(tmp_path, model, name, **fields) -> dict[str, torch.Tensor]:
    settings = {
        "model": str(model),
        "out": str(tmp_path / name),
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 0.001,
        "workers": 0,
        "checkpoint_every": 0,
        "validate_every": 0,
        "tracker": "none",
        "caption_dropout": 0.5,
    }
    return load_file(loop.train(open_run(TrainConfig.from_dict({**settings, **fields}))))


def test_training_from_latents_equals_training_from_images(options, tmp_path, model, data):
    encoded = encode(options)
    from_images = train(tmp_path, model, "images", data=str(data))
    both = {"data": str(data), "encoded": str(encoded.folder)}
    from_latents = train(tmp_path, model, "latents", **both)
    for key, weight in from_images.items():
        torch.testing.assert_close(weight, from_latents[key], rtol=0, atol=1e-5)


def test_sdxl_pooled_text_is_kept(tmp_path, data):
    model = save_base_model(tmp_path / "sdxl", sdxl=True)
    settings = {"model": str(model), "data": str(data), "out": str(tmp_path / "encoded")}
    encoded = encode({**settings, "dtype": "float32"})
    from_images = train(tmp_path, model, "images", data=str(data), steps=1)
    both = {"data": str(data), "encoded": str(encoded.folder), "steps": 1}
    from_latents = train(tmp_path, model, "latents", **both)
    for key, weight in from_images.items():
        torch.testing.assert_close(weight, from_latents[key], rtol=0, atol=1e-4)


def test_variants_of_references_alternate_by_epoch_and_need_no_images(options, tmp_path, model):
    encoded = encode(options, reference_variants=2)
    latents = [encoded.read_reference(3, epoch)["reference_latent"] for epoch in range(3)]
    assert not torch.allclose(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])
    trained = train(tmp_path, model, "run", encoded=str(encoded.folder))
    assert all(bool(weight.isfinite().all()) for weight in trained.values())


def test_references_are_altered_as_asked_in_both_ways_of_training(options, tmp_path, model, data):
    plain = {"keep_reference": True}
    encoded = encode({**options, "out": str(tmp_path / "plain")}, reference_variants=8, **plain)
    altered = encode({**options, "out": str(tmp_path / "altered")}, reference_variants=8)

    def differing(name: str) -> int:
        pairs = ((index, epoch) for index in range(3) for epoch in range(8))
        rows = (
            (encoded.read_reference(*at)[name], altered.read_reference(*at)[name]) for at in pairs
        )
        return sum(not torch.equal(*row) for row in rows)

    assert 6 < differing("reference_latent") < 24, (
        "size and place are the same, 3 in 10 are unaltered"
    )
    trained = [
        train(tmp_path, model, "all", data=str(data)),
        train(tmp_path, model, "none", data=str(data), **plain),
        train(tmp_path, model, "set", encoded=str(encoded.folder), **plain),
    ]
    assert any(not torch.equal(trained[0][key], trained[1][key]) for key in trained[0])
    with pytest.raises(InputError, match="reference_flip was True, is False"):
        train(tmp_path, model, "run", encoded=str(altered.folder), **plain)


def test_buckets_keep_the_aspect(options, tmp_path):
    narrow = write_pairs(tmp_path / "narrow", 2, size=(80, 160))
    encoded = encode(options, data=str(narrow), buckets=True, resolution=192)
    assert set(encoded.index.sizes) == {(256, 128)}
    assert tuple(encoded.read_target(0)["target_latent"].shape) == (4, 32, 16)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(options, tmp_path, monkeypatch):
    whole = encode(options)
    monkeypatch.setitem(options, "out", str(tmp_path / "cut"))
    real = encoding._Encoder.write
    calls = []

    def write_twice(self, path, shard):
        calls.append(shard)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, path, shard)

    monkeypatch.setattr(encoding._Encoder, "write", write_twice)
    with pytest.raises(KeyboardInterrupt):
        encode(options)
    with pytest.raises(DreamCacheError, match="dataset encode' again"):
        EncodedSet(tmp_path / "cut")
    monkeypatch.setattr(encoding._Encoder, "write", real)
    first = tmp_path / "cut" / "000000.safetensors"
    written = first.stat().st_mtime_ns
    cut = encode(options)
    assert first.stat().st_mtime_ns == written, "a finished shard was written again"
    names = sorted(path.name for path in whole.folder.iterdir())
    assert sorted(path.name for path in cut.folder.iterdir()) == names
    for name in (name for name in names if name.endswith(".safetensors")):
        assert (cut.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_two_processes_write_the_same_files_as_one(options, tmp_path):
    whole = encode(options)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    given = {**options, "out": str(tmp_path / "two")}
    flags = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, *launcher, "-m", "dreamcache_core", "dataset", "encode", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in whole.folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        if name.endswith(".safetensors"):
            ours, theirs = (load_file(folder / name) for folder in (whole.folder, tmp_path / "two"))
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dtype": "float16"}, "dtype was"), ({"reference_variants": 1}, "num_variants was")],
)
def test_a_folder_of_another_encoding_is_refused(options, changes, message):
    encode(options)
    with pytest.raises(InputError, match=message):
        encode(options, **changes)


def test_a_set_of_other_data_or_another_model_is_not_trained_on(options, tmp_path, model):
    encoded = str(encode(options).folder)
    other = write_pairs(tmp_path / "other", 3)
    with pytest.raises(InputError, match="data_fingerprint was"):
        train(tmp_path, model, "run", data=str(other), encoded=encoded)
    with pytest.raises(InputError, match="resolution was"):
        train(tmp_path, model, "run", data=options["data"], encoded=encoded, resolution=128)
    with pytest.raises(InputError, match="give data as well"):
        train(tmp_path, model, "run", encoded=encoded)
    changed = save_base_model(tmp_path / "changed")
    weights = changed / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(InputError, match="model_fingerprint was"):
        train(tmp_path, changed, "run", data=options["data"], encoded=encoded)


def test_a_damaged_shard_is_named(options, tmp_path, model):
    encoded = encode(options)
    (encoded.folder / "000001.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"000001\.safetensors is missing or damaged"):
        train(tmp_path, model, "run", data=options["data"], encoded=str(encoded.folder), steps=6)


def test_command_prints_the_folder_and_names_bad_images(options, tmp_path, capsys):
    data = write_pairs(tmp_path / "set", 2)
    settings = {**options, "data": str(data)}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["dataset", "encode", *flags]) == 0
    assert capsys.readouterr().out.strip() == options["out"]
    index = json.loads((tmp_path / "encoded" / "index.json").read_text())
    assert len(index["keys"]) == 2
    (data / "subject_0" / "000_generation.png").write_bytes(b"nothing")
    again = [flag for flag in flags if not flag.startswith("--out")]
    assert main(["dataset", "encode", *again, f"--out={tmp_path / 'again'}"]) == 2
    assert "000_generation.png" in capsys.readouterr().err


def test_shards_of_another_set_are_not_taken_over_without_an_index(options):
    first = encode(options, reference_variants=1)
    before = first.read_reference(0, 0)["reference_latent"]
    (first.folder / "index.json").unlink()
    again = encode(options, reference_variants=1, seed=7)
    assert not torch.allclose(again.read_reference(0, 0)["reference_latent"], before)


def test_a_changed_caption_makes_it_another_set(options, tmp_path):
    data = write_pairs(tmp_path / "set", 2)
    encode(options, data=str(data))
    (data / "subject_0" / "000_caption.txt").write_text("something else", encoding="utf-8")
    with pytest.raises(InputError, match="data_fingerprint was"):
        encode(options, data=str(data))


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"resolution": 32}, {"batch_size": 0}])
def test_options_out_of_range_are_refused(options, wrong):
    with pytest.raises(InputError, match=r"must be|multiple of 8"):
        EncodeOptions.from_dict({**options, **wrong})


def test_changed_bytes_of_a_shard_are_refused_and_not_trained_with(options):
    encoded = encode(options)
    shard = encoded.folder / "000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    damaged = EncodedSet(encoded.folder)
    with pytest.raises(DreamCacheError, match=r"000000\.safetensors .* other values than were wri"):
        [damaged.read_target(index) for index in range(2)]


def test_shard_of_another_set_is_refused(options, tmp_path):
    encoded = encode(options)
    other = encode(options, out=str(tmp_path / "other"), seed=7)
    name = "000000.safetensors"
    (encoded.folder / name).write_bytes((other.folder / name).read_bytes())
    with pytest.raises(DreamCacheError, match="belongs to another set"):
        EncodedSet(encoded.folder).read_target(0)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": ["a"]},
        {"captions": [1, 2, 3, 4, 5]},
        {"samples_per_shard": 0},
        {"samples_per_shard": "2"},
        {"sizes": [[64, 64, 3]]},
        {"sizes": [[64, -8]] * 5},
        {"more": 1},
        None,
    ],
)
def test_index_that_does_not_fit_together_is_refused(options, change):
    encoded = encode(options)
    index = encoded.folder / "index.json"
    values = None if change is None else {**json.loads(index.read_text()), **change}
    index.write_text(json.dumps(values))
    with pytest.raises(DreamCacheError, match="no complete precomputed set"):
        EncodedSet(encoded.folder)


def test_entries_of_an_index_that_nothing_writes_are_named(options):
    encoded = encode(options)
    index = encoded.folder / "index.json"
    written = json.loads(index.read_text())
    for name, value in (
        ("sizes", [[65, 67]] * 5),
        ("sizes", [[64, 10**18]] * 5),
        ("keys", "abcde"),
        ("captions", dict.fromkeys("abcde")),
        ("num_variants", True),
        ("resolution", 10**30),
        ("has_pooled", "no"),
        ("reference_flip", 1),
        ("dtype", ["float16"]),
    ):
        index.write_text(json.dumps({**written, name: value}))
        with pytest.raises(
            DreamCacheError, match=rf"ValueError: {name}: not what 'dataset encode'"
        ):
            EncodedSet(encoded.folder)
