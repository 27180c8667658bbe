"""The training of the demo's base model: it resumes, it writes a model that loads, and its latents fit SD's scale."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dreamcache_core.data.sources.opening import open_source
from dreamcache_core.demo.files import DemoFiles
from dreamcache_core.demo.world.backgrounds import BACKGROUNDS
from dreamcache_core.demo.world.patterns import PATTERNS
from dreamcache_core.demo.world.world import PAPER
from dreamcache_core.errors import StateError
from dreamcache_core.fitting.noise_schedule import NoiseSchedule
from dreamcache_core.pipeline.loading import load_diffusers_pipeline
from research.demo_model.architecture import (
    SCALING_FACTOR,
    UNET_CHANNELS,
    make_autoencoder,
    train_tokenizer,
)
from research.demo_model.autoencoder_stage import (
    AutoencoderStage,
    RepeatingAutoencoder,
    encode,
    normalise_latents,
    to_tensor,
)
from research.demo_model.denoiser_stage import DenoiserStage
from research.demo_model.draw_pairs import PairsConfig, draw_pairs
from research.demo_model.image_pool import PATCH, open_pool
from research.demo_model.stages import Schedule, train_stage
from research.demo_model.train_base import main

pytestmark = pytest.mark.diffusers

torch.set_num_threads(1)

SHORT = (
    "--images 4 --autoencoder_colour_steps 1 --autoencoder_steps 1 --autoencoder_full_steps 1 "
    "--decoder_steps 1 --unet_steps 1 --unet_batch 2"
)


class LineStage:
    """Learns y = 2 x from points."""

    name = "line"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Linear(1, 1)

    def loss(self, module: nn.Module, random: np.random.Generator) -> torch.Tensor:
        x = torch.from_numpy(random.standard_normal((8, 1), dtype=np.float32))
        return (module(x) - 2 * x).square().mean()


class WrongOnTheLeft(nn.Module):
    """Predicts v of all-zero latents, whose noise it sees scaled, 3 too high in the left half."""

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        assert tokens.shape == (len(noisy), 3)
        kept = torch.linspace(0.99, 0.01, 1000)[timesteps].reshape(-1, 1, 1, 1)
        noise = noisy / (1.0 - kept).sqrt()
        return kept.sqrt() * noise + torch.tensor([3.0, 0.0])


def train_line(folder: Path, steps: int = 60) -> dict[str, torch.Tensor]:
    stage = LineStage()
    schedule = Schedule(steps, 0.1, 5, ema_decay=0.5, save_every=20, seed=0)
    assert train_stage(stage, schedule, folder, "no")
    return stage.module.state_dict()


def test_stage_learns_and_resumes_to_the_same_weights(tmp_path: Path):
    at_once = train_line(tmp_path / "at_once")
    assert at_once["weight"].item() == pytest.approx(2.0, abs=0.15)
    halfway = tmp_path / "at_once" / "checkpoints" / "step-000040"
    shutil.copytree(halfway, tmp_path / "resumed" / "checkpoints" / halfway.name)
    resumed = train_line(tmp_path / "resumed")
    assert all(torch.equal(resumed[name], at_once[name]) for name in at_once)


def test_training_that_is_done_does_no_further_step(tmp_path: Path):
    first = train_line(tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    assert log.count("\n") == 1
    again = train_line(tmp_path)
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_normalised_latents_fit_the_scaling_factor_and_decode_to_the_same_images(tmp_path: Path):
    torch.manual_seed(0)
    autoencoder = make_autoencoder().eval()
    images = open_pool(tmp_path, 6, seed=0).images
    with torch.no_grad():
        before = autoencoder(to_tensor(np.asarray(images))).sample
        normalise_latents(autoencoder, images, "no")
        after = autoencoder(to_tensor(np.asarray(images))).sample
    latents = encode(autoencoder, images, "no") * SCALING_FACTOR
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
    assert main(["--out", str(tmp_path), *SHORT.split()]) == 0
    model = tmp_path / "model"
    needed = (path.relative_to(tmp_path) for path in DemoFiles(tmp_path))
    assert [str(path) for path in needed if not (tmp_path / path).is_file()] == [
        "adapters.safetensors"
    ]
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    pipeline = load_diffusers_pipeline(model)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a mug on the grass", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 128, 128, 3)
    assert np.isfinite(images).all()


def test_training_goes_on_from_another_model(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["--out", str(first), *SHORT.split()]) == 0
    none = "--autoencoder_steps 0 --autoencoder_full_steps 0 --decoder_steps 0 --unet_steps 0 --images 4"
    assert main(["--out", str(second), "--start_from", str(first / "model"), *none.split()]) == 0
    for part in (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
    ):
        before = load_file(first / "model" / f"{part}.safetensors")
        after = load_file(second / "model" / f"{part}.safetensors")
        assert all(torch.equal(after[name], before[name]) for name in before)
        config = (second / "model" / part).parent / "config.json"
        assert str(tmp_path) not in config.read_text()


def test_a_u_net_of_other_widths_is_begun_anew_and_the_rest_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = tmp_path / "first", tmp_path / "second"
    with monkeypatch.context() as patch:
        patch.setattr("research.demo_model.architecture.UNET_CHANNELS", (32, 32, 32, 32))
        assert main(["--out", str(first), *SHORT.split()]) == 0
    none = "--autoencoder_steps 0 --autoencoder_full_steps 0 --decoder_steps 0 --unet_steps 0 --images 4"
    assert main(["--out", str(second), "--start_from", str(first / "model"), *none.split()]) == 0
    config = json.loads((second / "model" / "unet" / "config.json").read_text(encoding="utf-8"))
    assert tuple(config["block_out_channels"]) == UNET_CHANNELS
    text = "model/text_encoder/model.safetensors"
    before, after = load_file(first / text), load_file(second / text)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_decoder_alone_learns_and_latents_stay(tmp_path: Path):
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    pool = open_pool(tmp_path / "images", 4, seed=0)
    before = encode(autoencoder, pool.images, "no")
    weights = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    stage = AutoencoderStage(
        RepeatingAutoencoder(autoencoder, decoder_alone=True),
        pool,
        batch=2,
        crop=64,
        colour_weight=0.0,
        device=torch.device("cpu"),
    )
    assert train_stage(stage, Schedule(2, 1e-3, 1, 0.5, 10, 0), tmp_path / "run", "no")
    assert torch.equal(encode(autoencoder, pool.images, "no"), before)
    moved = {
        name
        for name, value in autoencoder.state_dict().items()
        if not torch.equal(value, weights[name])
    }
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)


def test_pool_knows_which_patches_the_subject_reaches(tmp_path: Path):
    pool = open_pool(tmp_path, 40, seed=0)
    plain = [
        index
        for index, wordings in enumerate(pool.captions)
        if any(phrase in wordings[0] for phrase in BACKGROUNDS[PAPER].phrases)
    ]
    assert plain
    for index in plain:
        dark = (pool.images[index].min(axis=-1) < 160).reshape(16, 8, 16, 8)
        ink = dark.sum(axis=(1, 3)) > PATCH  # an outline may graze a patch by a row of pixels
        reached = pool.subjects[index]
        assert (ink & ~reached).mean() < 0.01
        assert (dark.any(axis=(1, 3)) & ~reached).mean() < 0.05
        # colours near white leave no ink inside, but there is an outline all around
        for axis in (0, 1):
            assert (ink.any(axis) != reached.any(axis)).sum() <= 1
        assert 0.02 < reached.mean() < 0.9


def test_pool_shows_some_subjects_twice_and_says_so(tmp_path: Path):
    pool = open_pool(tmp_path, 40, seed=0)
    twins = np.array(["and its twin" in wordings[0] for wordings in pool.captions])
    assert 0.2 < twins.mean() < 0.6
    sides = pool.subjects[:, :, :6].any(axis=(1, 2)) & pool.subjects[:, :, -6:].any(axis=(1, 2))
    assert sides[twins].all()
    assert not sides[~twins].all()


def test_errors_count_by_their_weights():
    def loss(weights: torch.Tensor) -> float:
        stage = DenoiserStage(
            nn.Identity(),
            nn.Identity(),
            NoiseSchedule(torch.linspace(0.99, 0.01, 1000), "v_prediction"),
            torch.zeros(1, 4, 2, 2),
            weights,
            torch.zeros(1, 1, 3, dtype=torch.long),
            torch.zeros(3, dtype=torch.long),
            batch=2,
            drop_caption=0.0,
            device=torch.device("cpu"),
        )
        return stage.loss(WrongOnTheLeft(), np.random.default_rng(0)).item()

    right = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert loss(right) == pytest.approx(0.0, abs=1e-6)
    assert loss(1.0 - right) == pytest.approx(9.0, abs=1e-3)
    assert loss(1.0 + 2.0 * right) == pytest.approx(9.0 / 4.0, abs=1e-3)


def test_drawn_pairs_are_a_training_set_of_subjects_cut_out(tmp_path: Path):
    source = open_source(draw_pairs(PairsConfig(out=str(tmp_path), pairs=20)))
    pairs = [source.read(index) for index in range(len(source.keys))]
    assert len(pairs) == 20
    assert not source.problems
    for pair in pairs:
        assert pair.mask is not None
        assert not {pattern.word for pattern in PATTERNS.values()} & set(pair.caption.split())
        assert 0.05 < pair.mask.mean() < 0.9


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StateError, match="trained by one process; 2 were started"):
        main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
