"""DINO and CLIP embeddings by ``transformers``, from local folders, and their cosine similarity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..pipeline.transformers_loading import load_with_processor, require_kind

MAX_ASPECT = 8


def check_model_folders(*, dino: str | Path, clip: str | Path) -> None:
    """Refuse folders that cannot be what the encoders need, before any work is done.

    Args:
        dino: For ``DinoEncoder``.
        clip: For ``ClipEncoder``.

    Raises:
        DreamCacheError: A folder is missing, or holds another kind of model.
    """
    require_kind(dino, "--dino", ["vit"])
    require_kind(clip, "--clip", ["clip"])


class ImageEncoder(ABC):
    """Images to vectors, resized as the processor in the model's folder says.

    Args:
        folder: Local folder of the model, with its processor.
        device: Where it runs, in float32.

    Raises:
        DreamCacheError: The folder is missing, damaged or holds another kind of model.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        self.processor, model = self._load(folder)
        self.model, self.device = model.to(device), device

    @abstractmethod
    def _load(self, folder: str | Path) -> tuple[Any, Any]: ...

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

    def _load(self, folder: str | Path) -> tuple[Any, Any]:
        return load_with_processor(
            folder,
            "--dino",
            "ViTModel",
            ["vit"],
            extra="eval",
            processor_class="AutoImageProcessor",
            add_pooling_layer=False,
        )

    def _embed(self, inputs: Any) -> Tensor:
        return self.model(**inputs).last_hidden_state[:, 0]  # of (images, 1 + patches, width)


class ClipEncoder(ImageEncoder):
    """Images and texts to CLIP's common space.

    Source: METHOD.md section 8: ViT-B/32. What a text has beyond the model's limit is cut off.
    """

    def _load(self, folder: str | Path) -> tuple[Any, Any]:
        return load_with_processor(folder, "--clip", "CLIPModel", ["clip"], extra="eval")

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed the middle square of images; see ``ImageEncoder.images``."""
        return super().images([_without_far_ends(image) for image in images])

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


def _without_far_ends(image: Image.Image) -> Image.Image:
    """Cut a thin image, of which the processor would make a huge one before it takes the middle square."""
    most = MAX_ASPECT * min(image.size)
    left, top = (max(0, side - most) // 2 for side in image.size)
    if not left and not top:
        return image
    return image.crop((left, top, image.width - left, image.height - top))


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1).cpu()
