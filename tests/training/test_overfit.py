"""The method on a model that knows a small world: adapters learn two subjects, and the images show them."""

import json
from pathlib import Path

import pytest
import torch
from tiny_world import CAPTION, SIDE_PX, disc, draw, world_pipeline

from dreamcache_core import DreamCachePipeline, ReferenceUse, load_adapters
from dreamcache_core.images.files import save_png
from dreamcache_core.images.reference import prepare_reference_image
from dreamcache_core.training.config import TrainConfig
from dreamcache_core.training.loop import train
from dreamcache_core.training.run import open_run

pytestmark = pytest.mark.diffusers

SUBJECTS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
GROUNDS = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


class Overfit:
    """Images of two subjects, and runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, draw(SUBJECTS, GROUNDS).split(1)
        world_pipeline(folder).save_pretrained(folder / "model")
        (folder / "data").mkdir()
        for index, image in enumerate(self.images):
            stem = folder / "data" / f"{index}"
            save_png(f"{stem}_generation.png", image)
            save_png(f"{stem}_mask.png", disc().float()[None, :, :, None].expand(-1, -1, -1, 3))
            Path(f"{stem}_caption.txt").write_text(CAPTION, encoding="utf-8")

    def train(self, name: str, **fields) -> tuple[Path, list[float]]:
        """Run the trainer -> file of the adapters, loss of each step."""
        settings = {
            "model": str(self.folder / "model"),
            "data": str(self.folder / "data"),
            "out": str(self.folder / name),
            "batch_size": 8,
            "workers": 0,
            "checkpoint_every": 0,
            "validate_every": 0,
            "tracker": "none",
            "log_every": 1,
            **fields,
        }
        file = train(open_run(TrainConfig.from_dict(settings)))
        lines = (self.folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return file, [json.loads(line)["loss"] for line in lines]

    def loss(self, name: str, **fields) -> float:
        """Mean loss over 240 samples, the same ones each time, of adapters that stay as they are."""
        losses = self.train(name, steps=30, learning_rate=1e-12, seed=1, **fields)[1]
        return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def overfit(tmp_path_factory) -> Overfit:
    return Overfit(tmp_path_factory.mktemp("overfit"))


@pytest.fixture(scope="module")
def trained(overfit) -> Path:
    run = {"init": "paper", "learning_rate": 8e-3, "lr_schedule": "cosine", "steps": 400}
    return overfit.train("run", **run)[0]


def test_loss_falls_below_a_tenth_of_its_start(overfit, trained):
    before = overfit.loss("before", init="paper")
    after = overfit.loss("after", adapters=str(trained))
    assert after < before / 10


def test_images_show_the_reference_and_without_it_they_do_not(overfit, trained):
    pipeline = DreamCachePipeline(world_pipeline(overfit.folder))
    pipeline.pipeline.set_progress_bar_config(disable=True)
    adapters, mask = load_adapters(trained), disc()

    def colour_of_disc(reference: torch.Tensor, scale: float, seed: int) -> torch.Tensor:
        prepared, _ = prepare_reference_image(reference, mask.float()[None], size=SIDE_PX)
        use = ReferenceUse(pipeline.encode_reference(prepared), adapters, scale)
        image = pipeline(
            CAPTION,
            use,
            guidance_scale=1.0,
            image_guidance_scale=1.0,
            num_inference_steps=20,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        )
        return image[0, :, mask].mean(dim=1)

    for seed in (0, 1):
        shown = torch.stack([colour_of_disc(p, 1.0, seed) for p in overfit.images])
        plain = colour_of_disc(overfit.images[0], 0.0, seed)
        distances = (shown[:, None] - SUBJECTS[None]).abs().amax(dim=-1)
        assert float(distances.diagonal().max()) < 0.35, "a disc has not its reference's colour"
        assert float(distances.fliplr().diagonal().min()) > 0.6, "a disc has the other's colour"
        assert float((plain - SUBJECTS).abs().amax(dim=-1).min()) > 0.35


def test_the_worlds_autoencoder_keeps_mean_colours(overfit):
    codec = DreamCachePipeline(world_pipeline(overfit.folder)).codec
    image = torch.rand(1, 3, 8, 8).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    with torch.no_grad():
        decoded = codec.decode(codec.encode(image.permute(0, 2, 3, 1))) / 2 + 0.5
    torch.testing.assert_close(decoded, image, rtol=0, atol=1e-3)
