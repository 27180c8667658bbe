"""DINO and CLIP embeddings by ``transformers``, from local folders, and their cosine similarity."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import FileFormatError, InputError, UnsupportedModelError
from ..packages import require
from ..pipeline.loading import quiet_loading


def check_model_folders(*, dino: str | Path, clip: str | Path) -> None:
    """Refuse folders that cannot be what the encoders need, before any work is done.

    Args:
        dino: For ``DinoEncoder``.
        clip: For ``ClipEncoder``.

    Raises:
        DreamCacheError: A folder is missing, or holds another kind of model.
    """
    _require_kind(Path(dino), "dino", "vit")
    _require_kind(Path(clip), "clip", "clip")


class ImageEncoder(ABC):
    """Images to vectors, resized as the processor in the model's folder says.

    Args:
        folder: Local folder of the model, with its processor.
        device: Where it runs, in float32.

    Raises:
        DreamCacheError: The folder is missing, damaged or holds another kind of model.
    """

    parts: ClassVar[tuple[str, str, str, str]]
    """What ``_load`` takes: name, classes of model and processor, model type."""

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        self.processor, model = _load(Path(folder), *self.parts)
        self.model, self.device = model.to(device), device

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed images.

        Args:
            images: Of mode RGB, of any size.

        Returns:
            Unit vectors, (images, width), float32, on the CPU.
        """
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        return _unit(self._embed(inputs))

    @abstractmethod
    def _embed(self, inputs: Any) -> Tensor: ...


class DinoEncoder(ImageEncoder):
    """Images to DINO's class tokens.

    Source: METHOD.md section 8: ViT-S/16.
    """

    parts = ("dino", "ViTModel", "AutoImageProcessor", "vit")

    def _embed(self, inputs: Any) -> Tensor:
        return self.model(**inputs).last_hidden_state[:, 0]  # of (images, 1 + patches, width)


class ClipEncoder(ImageEncoder):
    """Images and texts to CLIP's common space.

    Source: METHOD.md section 8: ViT-B/32. What a text has beyond the model's limit is cut off.
    """

    parts = ("clip", "CLIPModel", "AutoProcessor", "clip")

    def _embed(self, inputs: Any) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(**inputs).pooler_output)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: At least one.

        Returns:
            Unit vectors, (texts, width), float32, on the CPU.
        """
        inputs = self.processor(
            text=list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        pooled = self.model.text_model(**inputs).pooler_output
        return _unit(self.model.text_projection(pooled))


def cosine_similarity(one: Tensor, other: Tensor) -> Tensor:
    """Compare every row of one matrix with every row of another.

    Args:
        one: (rows, width), any float dtype, no row all zero.
        other: (other rows, width).

    Returns:
        (rows, other rows), float32, in [-1, 1].
    """
    return (_unit(one) @ _unit(other).T).clamp(-1, 1)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1).cpu()


def _load(
    folder: Path, flag: str, model_class: str, processor_class: str, model_type: str
) -> tuple[Any, Any]:
    """Load a processor and its model, and refuse a model some of whose weights are not in the files."""
    with require("transformers", "eval"):
        import transformers
    _require_kind(folder, flag, model_type)
    options: dict[str, Any] = {"local_files_only": True}
    own = {"add_pooling_layer": False} if model_type == "vit" else {}
    try:
        with quiet_loading():
            processor = getattr(transformers, processor_class).from_pretrained(folder, **options)
            model, info = getattr(transformers, model_class).from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **own, **options
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


def _require_kind(folder: Path, flag: str, model_type: str) -> None:
    """Refuse a folder that is missing or says that it holds another kind of model."""
    if not folder.is_dir():
        raise InputError(
            f"Expected --{flag} to be a local model folder; there is no {folder}. Nothing is downloaded: fetch it first."
        )
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"Expected --{flag} to be a folder with a {model_type} model; {folder} has no config.json that names a "
            f"model ({type(error).__name__}). Give the folder that holds config.json and the weights."
        ) from error
    if found != model_type:
        raise UnsupportedModelError(
            f"Expected --{flag} to be a folder with a {model_type} model; {folder} holds a {found} model. Give another."
        )
