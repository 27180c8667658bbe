"""The ablations' training: each variant differs from the chosen adapters in what its name says, and in nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamcache_core.data.precomputed.encoded import EncodedSet
from dreamcache_core.demo.files import require_demo_files
from dreamcache_core.errors import InputError
from dreamcache_core.method.adapter_files import load_adapters
from research.demo_model.draw_pairs import PairsConfig, draw_pairs
from research.demo_model.train_variants import VARIANTS, VariantsConfig, train_variants

pytestmark = pytest.mark.diffusers

torch.set_num_threads(1)

NAMES = ["chosen", "timestep-300", "layers-encoder", "merge-sum", "data-4th"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VariantsConfig:
    folder = tmp_path_factory.mktemp("variants")
    config = VariantsConfig(
        model=str(require_demo_files().model),
        data=str(draw_pairs(PairsConfig(out=str(folder / "pairs"), pairs=8))),
        out=str(folder / "out"),
        work=str(folder / "work"),
        names=NAMES,
        steps=2,
    )
    command = [sys.executable, "-m", "research.demo_model.train_variants"]
    flags = {"model": config.model, "data": config.data, "out": config.out, "work": config.work}
    for name, value in flags.items():
        command += [f"--{name}", value]
    # a process of its own: Accelerate keeps one precision for the life of a process
    subprocess.run([*command, "--names", *NAMES, "--steps", "2"], check=True)
    return config


def test_each_variant_becomes_an_adapter_file_with_its_own_settings(config: VariantsConfig):
    adapters = {name: load_adapters(Path(config.out) / f"{name}.safetensors") for name in NAMES}
    assert adapters["chosen"].info.timestep == 1
    assert adapters["timestep-300"].info.timestep == 300
    assert len(adapters["chosen"].layers) == 5
    assert all(layer.startswith("input_blocks") for layer in adapters["layers-encoder"].layers)
    width = adapters["chosen"]["middle_block.1"].get_parameter("merge.weight").shape[0]
    added = torch.cat([torch.eye(width)] * 2, dim=1)
    assert torch.equal(adapters["merge-sum"]["middle_block.1"].get_parameter("merge.weight"), added)


def test_a_share_of_the_data_is_a_set_of_its_own(config: VariantsConfig):
    sets = [EncodedSet(Path(config.work) / f"encoded-{share}") for share in (1, 4)]
    assert [len(encoded.index.keys) for encoded in sets] == [8, 2]


def test_what_is_trained_is_left_alone(config: VariantsConfig):
    path = Path(config.out) / "chosen.safetensors"
    before = path.stat().st_mtime_ns
    assert path in train_variants(config)
    assert path.stat().st_mtime_ns == before
    assert load_file(path)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="no variant 'all'"):
        VariantsConfig(model="", data="", out="", work="", names=["all"])
    assert {"layers-all", "init-paper", "data-16th", "caption"} <= set(VARIANTS)
