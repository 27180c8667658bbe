"""Small training sets, and a tiny base model in a folder."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tiny_diffusers import random_unet
from tiny_pipeline import tiny_pipeline, tiny_sdxl_pipeline

COLOURS = ("red", "blue", "green", "orange", "purple", "teal", "black", "olive")


def write_pairs(folder: Path, count: int = 6, size: tuple[int, int] = (96, 80)) -> Path:
    """Write discs and squares of different colours on grey, in the authors' layout; width and height differ."""
    for index in range(count):
        subject = folder / f"subject_{index % 2}"
        subject.mkdir(parents=True, exist_ok=True)
        photo, mask = Image.new("RGB", size, (90, 90, 100)), Image.new("L", size, 0)
        box = (20 + index, 10, 60 + index, 50)
        for image, fill in ((photo, COLOURS[index % len(COLOURS)]), (mask, 255)):
            draw = ImageDraw.Draw(image)
            (draw.ellipse if index % 2 else draw.rectangle)(box, fill=fill)
        photo.save(subject / f"{index:03d}_generation.png")
        mask.save(subject / f"{index:03d}_mask.png")
        (subject / f"{index:03d}_caption.txt").write_text("a b", encoding="utf-8")
    return folder


def write_captioned(folder: Path, count: int = 6) -> Path:
    """Write the same as images with captions, and masks in a folder of their own."""
    write_pairs(folder, count)
    for image in sorted(folder.rglob("*_generation.png")):
        stem = image.name.removesuffix("_generation.png")
        masks = folder / "masks" / image.parent.name
        masks.mkdir(parents=True, exist_ok=True)
        image.with_name(f"{stem}_mask.png").rename(masks / f"{stem}.png")
        image.with_name(f"{stem}_caption.txt").rename(image.with_name(f"{stem}.txt"))
        image.rename(image.with_name(f"{stem}.png"))
    return folder


def save_base_model(folder: Path, *, sdxl: bool = False) -> Path:
    """Write a tiny pipeline with random weights as a diffusers folder; 64 pixels a side."""
    with torch.random.fork_rng():
        if sdxl:
            pipeline = tiny_sdxl_pipeline(folder)
        else:
            unet = random_unet(
                32,
                sample_size=8,
                block_out_channels=(16, 16, 32, 32),
                norm_num_groups=8,
            )
            pipeline = tiny_pipeline(folder, context_width=32, unet=unet)
    pipeline.save_pretrained(folder / "model")
    return folder / "model"
