"""Settings of a model that the libraries take as they are, and that would fail only once images are made."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from ..files.texts import read_json

MAX_TIMESTEPS = 100_000
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_settings(pipeline: Any, folder: Path) -> None:
    """Refuse a model with which no image can be made.

    Args:
        pipeline: The loaded pipeline, with all its parts.
        folder: Where its settings are from.

    Raises:
        FileFormatError: A setting has no value that it can have; the message names its file.
    """
    for file, name, value, wanted, is_fit in _settings(pipeline):
        if not is_fit:
            raise FileFormatError(
                f"Expected {name} in {folder / file} to be {wanted}, got {value!r}. Mend the file, or fetch it again."
            )


def check_table_size(folder: Path) -> None:
    """Refuse a scheduler whose table of noise levels would not fit into memory; it is made as the model is loaded.

    Args:
        folder: The model's folder, of diffusers' layout.

    Raises:
        FileFormatError: The table is longer than ``MAX_TIMESTEPS``, or its file is damaged.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    count = read_json(file).get("num_train_timesteps") if file.is_file() else None
    if isinstance(count, int) and count > MAX_TIMESTEPS:
        raise FileFormatError(
            f"Expected num_train_timesteps in {file} to be at most {MAX_TIMESTEPS}, got a number of {len(str(count))} digits. "
            "Mend the file, or fetch it again."
        )


def _settings(pipeline: Any) -> Iterator[tuple[str, str, object, str, bool]]:
    """Yield file and name of each setting, its value, what that should be, and whether it is."""
    size = pipeline.unet.config.sample_size
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size,)
    are_sides = all(map(_is_count, sides))
    yield "unet/config.json", "sample_size", size, "a whole number above 0, or two", are_sides

    file, vae = "vae/config.json", pipeline.vae.config
    factor, channels = vae.scaling_factor, vae.latent_channels
    yield (
        file,
        "scaling_factor",
        factor,
        "a number above 0",
        _are_numbers([factor], 1) and factor > 0,
    )
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    is_fit = mean is None or _are_numbers(mean, channels)
    yield file, "latents_mean", mean, f"null, or {channels} numbers", is_fit
    is_fit = std is None or (_are_numbers(std, channels) and 0 not in std)
    yield file, "latents_std", std, f"null, or {channels} numbers other than 0", is_fit

    file, scheduler = "scheduler/scheduler_config.json", pipeline.scheduler.config
    count = scheduler.num_train_timesteps
    yield file, "num_train_timesteps", count, "a whole number above 0", _is_count(count)
    kind = scheduler.get("prediction_type", PREDICTIONS[0])
    is_known = kind in PREDICTIONS
    yield file, "prediction_type", kind, f"one of {', '.join(PREDICTIONS)}", is_known

    for end in ("", "_2") if hasattr(pipeline, "tokenizer_2") else ("",):
        length = getattr(pipeline, f"tokenizer{end}").model_max_length
        most = getattr(pipeline, f"text_encoder{end}").config.max_position_embeddings
        file, wanted = f"tokenizer{end}/tokenizer_config.json", f"a whole number in 1 ... {most}"
        yield file, "model_max_length", length, wanted, _is_count(length) and length <= most


def _are_numbers(values: object, count: int) -> bool:
    if not isinstance(values, list | tuple) or len(values) != count:
        return False
    return all(isinstance(value, int | float) and -inf < value < inf for value in values)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
