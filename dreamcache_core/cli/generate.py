"""``dreamcache generate``: check everything, sample, and write the images with their parameters."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..images.files import save_png
from ..images.reference_files import prepare_references, read_references
from ..images.sheets import contact_sheet, sheet_cell
from ..names import printable
from ..pipeline.generate import (
    METADATA_KEY,
    GenerateOptions,
    make_folder,
    open_pipeline,
    sample_image,
    versions,
)

SHEET_COLUMNS = 4


def run(options: GenerateOptions) -> None:
    """Generate images and write them; nothing is written before everything has been checked.

    Args:
        options: What to do.

    Raises:
        DreamCacheError: Bad input; the message says what and what to do.
        OSError: A file could not be written.
    """
    out = _check_out(Path(options.out))
    images = read_references(options.reference, options.mask)
    pipeline = open_pipeline(options)
    size = options.size or min(pipeline.default_size_px)
    prepared = prepare_references(images, size=size, fill=options.fill)
    use = pipeline.use_reference(prepared, options.scale)
    make_folder(out)
    files = _Files(out, options.parameters(size, versions()), list(prepared.split(1)))
    with tqdm(total=options.count * options.steps, unit="step", desc="sampling") as bar:
        for seed in range(options.seed, options.seed + options.count):
            files.add_image(sample_image(pipeline, use, options, seed, size, bar), seed)
    files.finish()


def _check_out(out: Path) -> Path:
    """Refuse a target folder that could not be made or written to; make nothing yet."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"Cannot write to {out}: {nearest} is {'not writable' if nearest.is_dir() else 'a file'}. Give --out a "
            "folder of your own."
        )
    return out


class _Files:
    """The files of one run: ``0001_reference.png``, ``0001_seed_7.png``, ..., ``0001_sheet.png``.

    The number is the first free one of the folder when the first image is there, so nothing is overwritten, whoever else
    writes to it.
    """

    def __init__(
        self, folder: Path, parameters: Mapping[str, Any], references: list[Tensor]
    ) -> None:
        self.folder, self.parameters, self.references = folder, parameters, references
        self.number = 0
        self.images: list[tuple[Image.Image, int]] = []

    def add_image(self, image: Tensor, seed: int) -> None:
        if not self.images:
            one = len(self.references) == 1
            names = (
                ["reference"]
                if one
                else [f"reference_{i + 1}" for i in range(len(self.references))]
            )
            self.number = _claim_number(self.folder, names[0])
            for name, reference in zip(names, self.references, strict=True):
                self.write(name, reference, {})
        self.images.append((sheet_cell(image), seed))
        self.write(f"seed_{seed}", image, {**self.parameters, "seed": seed})

    def finish(self) -> None:
        rows: list[Sequence[Tensor | Image.Image]] = [self.references]
        captions = [["reference"] * len(self.references)]
        for start in range(0, len(self.images), SHEET_COLUMNS):
            chunk = self.images[start : start + SHEET_COLUMNS]
            rows.append([image for image, _ in chunk])
            captions.append([f"seed {seed}" for _, seed in chunk])
        self.write("sheet", contact_sheet(rows, captions), self.parameters)

    def write(self, name: str, image: Tensor, parameters: Mapping[str, Any]) -> None:
        path = self.folder / f"{self.number:04d}_{name}.png"
        save_png(path, image, {METADATA_KEY: json.dumps(parameters)} if parameters else None)
        tqdm.write(printable(str(path)))


def _claim_number(folder: Path, name: str) -> int:
    """Take the first free number by making its first file."""
    while True:
        number = _first_free_number(folder)
        try:
            (folder / f"{number:04d}_{name}.png").open("xb").close()
        except FileExistsError:
            continue
        return number


def _first_free_number(folder: Path) -> int:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    taken = [int(name.split("_")[0]) for name in names if name.split("_")[0].isdecimal()]
    return max(taken, default=0) + 1
