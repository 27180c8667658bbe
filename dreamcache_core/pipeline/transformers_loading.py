"""Models of transformers with their processors, from local folders. Nothing is downloaded; transformers is imported on first use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import FileFormatError, InputError, UnsupportedModelError
from ..files.texts import read_json
from ..packages import require
from .loading import quiet_loading


def load_with_processor(
    folder: str | Path,
    flag: str,
    model_class: str,
    kinds: Sequence[str],
    *,
    extra: str,
    processor_class: str = "AutoProcessor",
    **options: Any,
) -> tuple[Any, Any]:
    """Load a processor and its model.

    Args:
        folder: Local folder of both.
        flag: What names it on the command line, for messages: ``--clip``.
        model_class: Class of the model in transformers.
        kinds: Model types that are fit, as ``config.json`` names them.
        extra: Extra of this project that brings transformers.
        processor_class: Class of the processor.
        **options: Further ones of the model's ``from_pretrained``.

    Returns:
        Processor and model, float32, on the CPU, ready to use.

    Raises:
        FileFormatError: The files are damaged, or some of the model's weights are not in them.
        InputError: There is no such folder.
        MissingPackageError: transformers is not installed.
        UnsupportedModelError: The folder holds another kind of model.
    """
    with require("transformers", extra):
        import transformers
    require_kind(folder, flag, kinds)
    try:
        with quiet_loading():
            processor = getattr(transformers, processor_class).from_pretrained(
                folder, local_files_only=True
            )
            model, info = getattr(transformers, model_class).from_pretrained(
                folder,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # damaged files make transformers raise nearly anything
        raise FileFormatError(
            f"{folder} could not be loaded as a {model_class} ({type(error).__name__}: {error}). Check that its files, "
            "those of its processor too, are complete."
        ) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise FileFormatError(
            f"Expected all weights of a {model_class} in {folder}; {len(names)} are missing, {names[0]} for one. Fetch "
            "the model again."
        )
    return processor, model.eval()


def require_kind(folder: str | Path, flag: str, kinds: Sequence[str]) -> None:
    """Refuse a folder that is missing or says that it holds another kind of model; see ``load_with_processor``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"Expected {flag} to be a local model folder; there is no {folder}. Nothing is downloaded: fetch it first."
        )
    try:
        found = read_json(folder / "config.json")["model_type"]
    except (FileFormatError, KeyError) as error:
        raise FileFormatError(
            f"Expected {flag} to be a folder with a {kinds[0]} model; {folder} has no config.json that names a "
            f"model. Give the folder that holds config.json and the weights."
        ) from error
    if found not in kinds:
        raise UnsupportedModelError(
            f"Expected {flag} to be a folder with a {kinds[0]} model; {folder} holds a {found} model. Give another."
        )
