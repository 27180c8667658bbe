"""Train the U-Net of the tiny world and write tests/golden/tiny_world_unet.safetensors: half an hour on one core."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save
from tiny_world import CAPTION, UNET_FILE, draw, world_pipeline, world_unet
from tqdm import tqdm

from dreamcache_core.fitting.noise_schedule import NoiseSchedule
from dreamcache_core.pipeline.pipeline import DreamCachePipeline
from dreamcache_core.training.objective import denoising_loss

STEPS, BATCH, LEARNING_RATE = 9000, 16, 2e-3


def main(steps: int) -> None:
    unet = world_unet().train()
    base = DreamCachePipeline(world_pipeline(Path(tempfile.mkdtemp()), unet))
    schedule = NoiseSchedule(base.pipeline.scheduler.alphas_cumprod, "v_prediction")
    text = base.encode_text([CAPTION, ""]).states.detach()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    unet.requires_grad_(True)
    bar = tqdm(range(steps))
    for _ in bar:
        colours = torch.rand(2, BATCH, 3, generator=generator)
        with torch.no_grad():
            latent = base.codec.encode(draw(*colours))
        noise = torch.randn(latent.shape, generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        is_dropped = torch.rand(BATCH, generator=generator) < 0.07
        noised = schedule.add_noise(latent, noise, timesteps)
        output = unet(noised, timesteps, text[is_dropped.long()]).sample
        target = schedule.target(latent, noise, timesteps)
        loss = denoising_loss(output, target, torch.ones(BATCH))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        bar.set_postfix(loss=loss.item())
    weights = {name: weight.half() for name, weight in unet.state_dict().items()}
    UNET_FILE.write_bytes(save(weights))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
