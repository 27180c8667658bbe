"""Images from captions by any text-to-image pipeline of diffusers, from a local folder. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileFormatError, InputError
from ...pipeline.loading import quiet_loading, require_diffusers, weights_variant

AUTO_CLASS = "AutoPipelineForText2Image"


class TextToImage:
    """A loaded pipeline.

    Args:
        folder: Local diffusers folder.
        pipeline_class: Name of a class of diffusers; ``AutoPipelineForText2Image`` reads it from the folder.
        dtype: Float type of the weights.
        device: Where it runs.

    Raises:
        DreamCacheError: The folder is missing, damaged or no text-to-image model, or there is no such class.
    """

    def __init__(
        self, folder: str, *, pipeline_class: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pipeline: Any = _load_pipeline(Path(folder), pipeline_class, dtype).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Tensor:
        """Generate images, each from a random stream of its own.

        Args:
            prompts: One for each image.
            seeds: One for each image, in [0, 2^64).
            options: Further arguments of the pipeline; those that are ``None`` are left to it.

        Returns:
            (batch, height, width, 3), float32, in [0, 1], on the CPU.
        """
        given = {key: value for key, value in options.items() if value is not None}
        if "negative_prompt" in given:
            given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
        # on the CPU, so that every device starts from the same noise
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        result = self.pipeline(list(prompts), generator=generators, output_type="pt", **given)
        return result.images.permute(0, 2, 3, 1).float().cpu()


def _load_pipeline(folder: Path, pipeline_class: str, dtype: torch.dtype) -> Any:
    diffusers = require_diffusers()
    kind: Any = getattr(diffusers, pipeline_class, None)
    if not hasattr(kind, "from_pretrained"):
        raise InputError(
            f"Expected pipeline_class to be a pipeline of diffusers; there is no {pipeline_class!r}. Leave it out, or "
            "take the _class_name in the folder's model_index.json."
        )
    if not (folder / "model_index.json").is_file():
        raise FileFormatError(
            f"Expected model to be a local diffusers folder; there is no model_index.json in {folder}. Nothing is "
            "downloaded: fetch the whole folder first."
        )
    try:
        with quiet_loading():
            pipeline = kind.from_pretrained(
                str(folder), dtype=dtype, variant=weights_variant(folder), local_files_only=True
            )
    except Exception as error:  # damaged files make diffusers raise nearly anything
        raise FileFormatError(
            f"{folder} could not be loaded as a {pipeline_class} ({type(error).__name__}: {error}). Check that the "
            "files are complete and that the model makes images from text."
        ) from error
    return pipeline
