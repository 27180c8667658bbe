"""``python -m research.demo_model.train_base``: trains the demo's base model from nothing."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.config import Config
from dreamcache_core.demo.files import PREVIEW_FILE
from dreamcache_core.errors import StateError
from dreamcache_core.fitting.noise_schedule import NoiseSchedule
from dreamcache_core.pipeline.loading import load_diffusers_pipeline, require_diffusers

from .architecture import (
    SCALING_FACTOR,
    UNET_CHANNELS,
    make_autoencoder,
    make_scheduler,
    make_text_encoder,
    make_unet,
    train_tokenizer,
)
from .autoencoder_stage import (
    AutoencoderStage,
    RepeatingAutoencoder,
    encode,
    fit_preview,
    normalise_latents,
)
from .denoiser_stage import DenoiserStage, tokenise
from .image_pool import ImagePool, open_pool
from .stages import Schedule, train_stage

logger = logging.getLogger(__name__)

MEASURED_IMAGES = 500


@dataclass(frozen=True, kw_only=True)
class BaseConfig(Config):
    """Train the demo's autoencoder, text encoder and U-Net on drawn images; go on where an earlier run stopped.

    Attributes:
        out: Folder of the run; the model ends up in its folder 'model'.
        start_from: Diffusers folder of a demo model to go on from; empty: from nothing.
        images: Images to draw and train on.
        autoencoder_colour_steps: Steps of the autoencoder to find colours, if it begins from
            nothing.
        autoencoder_steps: Its steps after that on 64-pixel crops.
        autoencoder_full_steps: Its steps after that on whole images.
        decoder_steps: Steps of the decoder alone after these: the latents stay as they are.
        autoencoder_learning_rate: Highest learning rate of these.
        unet_steps: Steps of U-Net and text encoder.
        unet_batch: Images in a step of these.
        unet_learning_rate: Highest learning rate of these.
        subject_weight: Weight of the subject's part of an image; the rest has 1.
        drop_caption: Share of images with an empty caption.
        save_every: Steps between checkpoints.
        mixed_precision: Float type of the forward pass: no, fp16 or bf16.
        seed: Decides images, weights and batches.
    """

    out: str
    start_from: str = ""
    images: int = 24_000
    autoencoder_colour_steps: int = 600
    autoencoder_steps: int = 8_000
    autoencoder_full_steps: int = 4_000
    decoder_steps: int = 4_000
    autoencoder_learning_rate: float = 1e-3
    unet_steps: int = 30_000
    unet_batch: int = 48
    unet_learning_rate: float = 1e-3
    subject_weight: float = 3.0
    drop_caption: float = 0.1
    save_every: int = 500
    mixed_precision: str = "no"
    seed: int = 0


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0 when all is trained; 1 after an interrupt.

    Raises:
        StateError: It was started as several processes.
    """
    _require_one_process()
    config = parse_config(BaseConfig, argv, program="python -m research.demo_model.train_base")
    out = Path(config.out)
    torch.manual_seed(config.seed)
    pool = open_pool(out / "images", config.images, config.seed)
    autoencoder = _train_autoencoder(config, pool, out)
    if autoencoder is None:
        return 1
    return 0 if _train_denoiser(config, pool, autoencoder, out) else 1


def _require_one_process() -> None:
    """The model is small, and every process would draw the same batches and write the same files."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise StateError(
            f"The demo's base model is trained by one process; {started} were started. Call python directly."
        )


def _device() -> torch.device:
    from accelerate import PartialState

    state: Any = PartialState()
    return state.device


def _train_autoencoder(config: BaseConfig, pool: ImagePool, out: Path) -> Any:
    autoencoders = require_diffusers().AutoencoderKL
    finished = out / "vae"
    if finished.is_dir():
        return autoencoders.from_pretrained(finished).to(_device())
    rounds = [
        _Round("autoencoder-crops", config.autoencoder_steps, 1.0, batch=16, is_cropped=True),
        _Round("autoencoder", config.autoencoder_full_steps, 0.5, batch=4),
    ]
    if config.start_from:
        autoencoder = autoencoders.from_pretrained(Path(config.start_from) / "vae").train()
    else:
        autoencoder = make_autoencoder()
        colours = _Round("autoencoder-colours", config.autoencoder_colour_steps, 1.0, batch=16)
        rounds.insert(0, replace(colours, is_cropped=True, colour_weight=0.5))
    if not all(_train_round(config, part, autoencoder, pool, out) for part in rounds):
        return None
    if any(part.steps for part in rounds):
        normalise_latents(autoencoder.eval(), pool.images[:MEASURED_IMAGES], config.mixed_precision)
    alone = _Round("decoder", config.decoder_steps, 0.5, batch=4, decoder_alone=True)
    if not _train_round(config, alone, autoencoder.train(), pool, out):
        return None
    autoencoder.eval().save_pretrained(finished)
    return autoencoder


@dataclass(frozen=True)
class _Round:
    """One part of the autoencoder's training."""

    name: str
    steps: int
    pace: float
    batch: int
    is_cropped: bool = False
    colour_weight: float = 0.0
    decoder_alone: bool = False


def _train_round(
    config: BaseConfig, part: _Round, autoencoder: Any, pool: ImagePool, out: Path
) -> bool:
    side = pool.images.shape[1]
    stage = AutoencoderStage(
        RepeatingAutoencoder(autoencoder, decoder_alone=part.decoder_alone),
        pool,
        batch=part.batch,
        crop=side // 2 if part.is_cropped else side,
        colour_weight=part.colour_weight,
        device=_device(),
    )
    rate = part.pace * config.autoencoder_learning_rate
    schedule = Schedule(part.steps, rate, 100, 0.999, config.save_every, config.seed)
    return train_stage(stage, schedule, out / part.name, config.mixed_precision)


def _train_denoiser(config: BaseConfig, pool: ImagePool, autoencoder: Any, out: Path) -> bool:
    tokenizer, text_encoder, unet = _starting_point(config, pool)
    scheduler = make_scheduler()
    if _device().type == "cpu":
        _avoid_fused_attention(unet)
    latents = _latents(config, pool, autoencoder, out)
    stage = DenoiserStage(
        text_encoder,
        unet,
        NoiseSchedule(scheduler.alphas_cumprod, "v_prediction"),
        latents,
        1.0 + (config.subject_weight - 1.0) * torch.from_numpy(pool.subjects),
        tokenise(tokenizer, pool.captions),
        tokenise(tokenizer, [[""]])[0, 0],
        batch=config.unet_batch,
        drop_caption=config.drop_caption,
        device=_device(),
    )
    schedule = Schedule(
        config.unet_steps, config.unet_learning_rate, 200, 0.999, config.save_every, config.seed
    )
    finished = train_stage(stage, schedule, out / "unet", config.mixed_precision)
    _save(
        out / "model",
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )
    measured = slice(MEASURED_IMAGES)
    preview = fit_preview(latents[measured], pool.images[measured])
    (out / "model" / PREVIEW_FILE).write_text(f"{json.dumps(preview)}\n", encoding="utf-8")
    return finished


def _starting_point(config: BaseConfig, pool: ImagePool) -> tuple[Any, Any, Any]:
    """Tokenizer, text encoder and U-Net: those of another model, or new ones."""
    if config.start_from:
        pipeline = load_diffusers_pipeline(Path(config.start_from))
        unet = pipeline.unet
        if tuple(unet.config.block_out_channels) != UNET_CHANNELS:
            logger.info("%s has a U-Net of other widths: a new one is trained.", config.start_from)
            unet = make_unet()
        return pipeline.tokenizer, pipeline.text_encoder.train(), unet.train()
    tokenizer = train_tokenizer(text for wordings in pool.captions for text in wordings)
    return tokenizer, make_text_encoder(tokenizer), make_unet()


def _avoid_fused_attention(unet: Any) -> None:
    """On the CPU the backward of torch's fused attention takes a third of a step; plain matrix products are faster."""
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


def _latents(config: BaseConfig, pool: ImagePool, autoencoder: Any, out: Path) -> torch.Tensor:
    """Scaled latents of the pool in half precision, from the file that an earlier run left."""
    from safetensors.torch import load_file, save_file

    path = out / "images" / f"latents-{config.images}-{config.seed}.safetensors"
    if not path.is_file():
        latents = encode(autoencoder, pool.images, config.mixed_precision) * SCALING_FACTOR
        save_file({"latents": latents.half().contiguous()}, path)
    return load_file(path)["latents"]


def _save(folder: Path, **parts: Any) -> None:
    """Write the model as a diffusers folder in half precision, with the tokenizer in the files that CLIP's came in."""
    pipeline: Any = require_diffusers().StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    parts["tokenizer"].backend_tokenizer.model.save(str(folder / "tokenizer"))
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
        path.write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(sys.argv[1:]))
