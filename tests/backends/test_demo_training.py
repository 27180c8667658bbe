"""The training of the demo's base model: it resumes, it writes a model that loads, and its latents fit SD's scale."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dreamcache_core.data.opening import open_source
from dreamcache_core.demo.architecture import SCALING_FACTOR, make_autoencoder, train_tokenizer
from dreamcache_core.demo.autoencoder_stage import encode, normalise_latents, to_tensor
from dreamcache_core.demo.draw_pairs import PairsConfig, draw_pairs
from dreamcache_core.demo.picture_pool import open_pool
from dreamcache_core.demo.stages import Schedule, train_stage
from dreamcache_core.demo.train_base import main
from dreamcache_core.diffusers_loading import load_diffusers_pipeline

torch.set_num_threads(1)


class LineStage:
    """Learns y = 2 x from points."""

    name = "line"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Linear(1, 1)

    def loss(self, module: nn.Module, random: np.random.Generator) -> torch.Tensor:
        x = torch.from_numpy(random.standard_normal((8, 1), dtype=np.float32))
        return (module(x) - 2 * x).square().mean()


def train_line(folder: Path, steps: int = 40) -> dict[str, torch.Tensor]:
    stage = LineStage()
    schedule = Schedule(steps, 0.1, 5, ema_decay=0.5, save_every=20, seed=0)
    assert train_stage(stage, schedule, folder, "no")
    return stage.module.state_dict()


def test_stage_learns_and_resumes_to_the_same_weights(tmp_path: Path):
    at_once = train_line(tmp_path / "at_once")
    assert at_once["weight"].item() == pytest.approx(2.0, abs=0.15)
    halfway = tmp_path / "at_once" / "checkpoints" / "step-000020"
    shutil.copytree(halfway, tmp_path / "resumed" / "checkpoints" / halfway.name)
    resumed = train_line(tmp_path / "resumed")
    assert all(torch.equal(resumed[name], at_once[name]) for name in at_once)


def test_training_that_is_done_does_no_further_step(tmp_path: Path):
    first = train_line(tmp_path)
    log = (tmp_path / "log.jsonl").read_text() if (tmp_path / "log.jsonl").exists() else ""
    again = train_line(tmp_path)
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert log == ((tmp_path / "log.jsonl").read_text() if log else "")


def test_normalised_latents_fit_the_scaling_factor_and_decode_to_the_same_pictures(tmp_path: Path):
    torch.manual_seed(0)
    autoencoder = make_autoencoder().eval()
    pictures = open_pool(tmp_path, 6, seed=0).pictures
    with torch.no_grad():
        before = autoencoder(to_tensor(np.asarray(pictures))).sample
        normalise_latents(autoencoder, pictures, "no")
        after = autoencoder(to_tensor(np.asarray(pictures))).sample
    latents = encode(autoencoder, pictures, "no") * SCALING_FACTOR
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)


def test_tokenizer_knows_the_words_it_learnt_and_splits_others():
    tokenizer = train_tokenizer(["a striped mug on the grass, left"] * 3)
    words = tokenizer.convert_ids_to_tokens(tokenizer("a striped mug, left").input_ids)
    assert words[1:-1] == ["a</w>", "striped</w>", "mug</w>", ",</w>", "left</w>"]
    unknown = tokenizer("zebra").input_ids
    assert len(unknown) > 3
    assert tokenizer.decode(unknown, skip_special_tokens=True).strip() == "zebra"


def test_a_short_training_writes_a_model_that_draws(tmp_path: Path):
    flags = "--pictures 4 --autoencoder_steps 1 --autoencoder_full_steps 1 --unet_steps 1 --unet_batch 2"
    assert main(["--out", str(tmp_path), *flags.split()]) == 0
    model = tmp_path / "model"
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "model_index.json"):
        assert (model / name).is_file()
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    pipeline = load_diffusers_pipeline(model)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a mug on the grass", num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 128, 128, 3)
    assert np.isfinite(pictures).all()


def test_drawn_pairs_are_a_training_set_of_subjects_cut_out(tmp_path: Path):
    source = open_source(draw_pairs(PairsConfig(out=str(tmp_path), pairs=5)))
    pairs = [source.read(index) for index in range(len(source.keys))]
    assert len(pairs) == 5
    assert not source.problems
    for pair in pairs:
        assert pair.mask is not None
        assert 0.05 < pair.mask.mean() < 0.9
