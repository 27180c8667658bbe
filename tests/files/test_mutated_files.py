"""Property of every kind of file that is read: equal values, or one line of words, in time and in bounded memory."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutations, require_equal_or_refused
from PIL import Image

from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.data.precomputed.encoded import EncodedIndex
from dreamcache_core.data.sources.manifest import ManifestSource
from dreamcache_core.data.sources.shards import ShardSource
from dreamcache_core.data.synthetic.captions import read_captions
from dreamcache_core.data.synthetic.folder import read_rejections
from dreamcache_core.evaluation.dreambench.prompts import read_benchmark
from dreamcache_core.evaluation.dreambench.scores import ImageScore, ScoreLog
from dreamcache_core.files.texts import read_json
from dreamcache_core.images.files import read_image
from dreamcache_core.method.adapter_files import load_adapters
from dreamcache_core.method.cache import ReferenceCache
from dreamcache_core.training.checkpoints import Checkpoints, cut_log
from dreamcache_core.training.config import TrainConfig

IDENTITY = {"base model": "abc", "seed": 0}


def saved(write: Callable[[Path], object], name: str, folder: Path) -> bytes:
    path = folder / name
    write(path)
    content = path.read_bytes()
    path.unlink()
    return content


def image_file(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(stream, format=kind)
    return stream.getvalue()


def shard() -> bytes:
    stream = io.BytesIO()
    parts = {"generation.png": image_file("PNG"), "caption.txt": b"a dog", "mask.png": b"1"}
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key in ("0", "1" * 120):
            for ending, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def read_shard(path: Path) -> Any:
    source = ShardSource(path)
    return [(source.caption(i), source.size(i)) for i in range(len(source.keys))]


def read_manifest(path: Path) -> Any:
    source = ManifestSource(path)
    return [(key, source.caption(i), source.stamp(i)) for i, key in enumerate(source.keys)]


def read_image_file(path: Path) -> Any:
    return read_image(path)


def is_image(found: Any) -> bool:
    image, alpha = found
    low, high = image.aminmax()
    return bool(low >= 0 and high <= 1) and (alpha is None or alpha.shape == image.shape[:3])


INDEX = EncodedIndex(
    keys=["a", "b"], sizes=[(64, 64), (64, 128)], captions=["x", "y"], samples_per_shard=2,
    num_variants=0, has_pooled=False, resolution=64, data_fingerprint="d", model_fingerprint="m",
    dtype="float32", seed=0,
)  # fmt: skip

SCORE = ImageScore("a", "b", 0, 0, "c", "f", 0.5, 0.25, 0.125, None, None)


def read_scores(path: Path) -> Any:
    return ScoreLog(path.parent).read()


def read_run(path: Path) -> Any:
    run = Checkpoints(path.parent, keep=1)
    return run.read_identity()


def cut(path: Path) -> Any:
    content = path.read_bytes()
    cut_log(path, 20)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_bytes(content)
    return kept


def is_anything(found: Any) -> bool:
    return found is not None


def steps_are_numbers(found: Any) -> bool:
    return all(entry["step"] <= 20 for entry in found)


TOML = b"""model = "sd"
out = "out"
data = "set"
steps = 7
learning_rate = 1e-4
buckets = true
layers = ["middle_block.1"]
validation_prompts = ["a dog", "--resume"]
"""


def read_config(path: Path) -> Any:
    return parse_config(TrainConfig, [f"--config={path}"], program="train")


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, valid contents, how it is read, what holds of what is read, how many mutations."""

    name: str
    content: bytes | Callable[[Path], object]
    read: Callable[[Path], Any]
    check: Callable[[Any], bool] = is_anything
    count: int = 300


def write_reference(path: Path) -> None:
    features = {
        "middle_block.1": torch.ones(1, 4, 2, 3),
        "output_blocks.4.1": torch.ones(1, 2, 2, 3),
    }
    ReferenceCache(features, 48, (16, 24), seed=3).save(path)


def write_released(path: Path) -> None:
    stem = "diffusion_model.middle_block.1.transformer_blocks.0"
    square, bias = torch.ones(4, 4), torch.ones(4)
    names = [f"attn_mem.to_{name}.weight" for name in ("q", "k", "v", "out.0")]
    state = {f"{stem}.{name}": square.clone() for name in names}
    state |= {f"{stem}.norm2_mem.{name}": bias.clone() for name in ("weight", "bias")}
    state |= {f"{stem}.attn_mem.to_out.0.bias": bias.clone()}
    state |= {f"{stem}.linear_cat.weight": torch.ones(4, 8), f"{stem}.linear_cat.bias": bias}
    torch.save(state, path)


def all_ones(adapters: Any) -> bool:
    return all(bool((value == 1).all()) for value in adapters.state_dict().values())


def features_are_ones(cache: Any) -> bool:
    return all(bool((feature == 1).all()) for feature in cache.features.values())


LINES = [{"step": 10, "loss": 0.5}, {"step": 30, "loss": 0.25}]
ROWS = [
    {"image": "set.jsonl", "caption": "a dog", "mask": ""},
    {"image": "set.jsonl", "caption": ""},
]
KINDS = {
    "reference": Kind("f.safetensors", write_reference, ReferenceCache.load, features_are_ones),
    "released adapters": Kind("f.pt", write_released, load_adapters, all_ones),
    **{kind: Kind("f.img", image_file(kind), read_image_file, is_image)
       for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")},
    "shard": Kind("f.tar", shard(), read_shard),
    "manifest": Kind("set.jsonl", "\n".join(map(json.dumps, ROWS)).encode(), read_manifest),
    "csv": Kind("set.csv", b'image,caption\nset.csv,"a dog, running"\nset.csv,b\n', read_manifest),
    "captions": Kind("f.txt", b"a dog\ta dog on the beach\na cat, in the snow\n", read_captions),
    "subjects": Kind("f.csv", b"subject,class,kind\nmug,mug,object\nrex,dog,live\n",
                     lambda path: read_benchmark(subjects=path)),
    "index": Kind("index.json", json.dumps(asdict(INDEX)).encode(), EncodedIndex.load),
    "run": Kind("run.json", json.dumps({"identity": IDENTITY}).encode(), read_run),
    "json": Kind("f.json", json.dumps(IDENTITY).encode(), read_json),
    "log": Kind("log.jsonl", "\n".join(map(json.dumps, LINES)).encode(), cut, steps_are_numbers),
    "scores": Kind("scores-00000.jsonl", json.dumps(asdict(SCORE)).encode(), read_scores),
    "rejections": Kind("rejected-00000.jsonl", b'{"number": 3, "reason": "blank"}\n',
                       lambda path: read_rejections(path.parent)),
    "toml": Kind("f.toml", TOML, read_config, count=60),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_mutated_file_gives_equal_values_or_one_line_of_words(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    content = kind.content
    if not isinstance(content, bytes):
        content = saved(content, kind.name, tmp_path)
    require_equal_or_refused(tmp_path / kind.name, content, kind.read, kind.check)
    for mutated in mutations(content, kind.count):
        require_equal_or_refused(tmp_path / kind.name, mutated, kind.read, kind.check)
