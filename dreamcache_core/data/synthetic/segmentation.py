"""Find a named subject in an image with models of ``transformers``, from local folders. Nothing is downloaded."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...images.tensors import tensor_to_image
from ...pipeline.transformers_loading import load_with_processor


class Segmenter(Protocol):
    """Marks a subject in an image."""

    def __call__(self, image: Tensor, subject: str) -> Tensor:
        """Find the subject.

        Args:
            image: (1, height, width, 3), float, in [0, 1].
            subject: What to look for.

        Returns:
            (1, height, width), bool, on the CPU; all false where the subject was not found.
        """
        ...


def check_thresholds(mask_threshold: float, box_threshold: float) -> None:
    """Refuse thresholds of ``load_segmenter`` that are no probabilities.

    Raises:
        InputError: One is outside (0, 1).
    """
    for name, value in (("mask_threshold", mask_threshold), ("box_threshold", box_threshold)):
        if not 0 < value < 1:
            raise InputError(f"Expected {name} in (0, 1), got {value}.")


def load_segmenter(
    model: str,
    detector: str | None,
    *,
    flag: str,
    mask_threshold: float,
    box_threshold: float,
    device: torch.device,
) -> Segmenter:
    """Load CLIPSeg, or with a detector SAM and Grounding DINO.

    Args:
        model: Folder of CLIPSeg or SAM.
        detector: Folder of Grounding DINO, or ``None``.
        flag: What messages call ``model``.
        mask_threshold: See ``ClipSegmenter``.
        box_threshold: See ``GroundedSegmenter``.
        device: Where they run, in float32.

    Raises:
        DreamCacheError: A folder is missing, damaged or holds another kind of model.
    """
    if detector is None:
        return ClipSegmenter(model, flag=flag, threshold=mask_threshold, device=device)
    return GroundedSegmenter(detector, model, flag=flag, box_threshold=box_threshold, device=device)


class ClipSegmenter:
    """CLIPSeg: one model from text to a soft mask."""

    def __init__(
        self,
        model: str,
        *,
        threshold: float,
        device: torch.device,
        flag: str = "--segmenter_model",
    ) -> None:
        """Load the model.

        Args:
            model: Its folder.
            flag: What messages call it.
            threshold: Probability from which on a pixel belongs to the subject, in (0, 1).
            device: Where it runs, in float32.

        Raises:
            DreamCacheError: The folder is missing, damaged or holds another kind of model.
        """
        parts = _load(model, flag, "CLIPSegForImageSegmentation", ("clipseg",), device)
        self.processor, self.model = parts
        self.threshold, self.device = threshold, device

    @torch.inference_mode()
    def __call__(self, image: Tensor, subject: str) -> Tensor:
        """See ``Segmenter``."""
        inputs = self.processor(
            text=[subject],
            images=[tensor_to_image(image)],
            truncation=True,
            return_tensors="pt",
        )
        logits = self.model(**inputs.to(self.device)).logits
        logits = logits.reshape(1, 1, *logits.shape[-2:]).float()
        size = (image.shape[1], image.shape[2])
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return (logits.sigmoid() > self.threshold)[0].cpu()


class GroundedSegmenter:
    """Grounding DINO finds the subject's box, SAM its outline."""

    def __init__(
        self,
        detector: str,
        segmenter: str,
        *,
        box_threshold: float,
        device: torch.device,
        flag: str = "--segmenter_model",
    ) -> None:
        """Load both models.

        Args:
            detector: Folder of Grounding DINO.
            segmenter: Folder of SAM.
            flag: What messages call it.
            box_threshold: Score from which on a box counts as found, in (0, 1).
            device: Where they run, in float32.

        Raises:
            DreamCacheError: A folder is missing, damaged or holds another kind of model.
        """
        kinds = ("grounding-dino", "mm-grounding-dino")
        name = "AutoModelForZeroShotObjectDetection"
        self.detector = _load(detector, "--detector_model", name, kinds, device)
        self.segmenter = _load(segmenter, flag, "SamModel", ("sam",), device)
        self.box_threshold, self.device = box_threshold, device

    @torch.inference_mode()
    def __call__(self, image: Tensor, subject: str) -> Tensor:
        """See ``Segmenter``; of several boxes, the one with the highest score counts."""
        pil_image = tensor_to_image(image)
        box = self._best_box(pil_image, subject)
        if box is None:
            return torch.zeros(image.shape[:3], dtype=torch.bool)
        processor, model = self.segmenter
        inputs = processor(images=pil_image, input_boxes=[[box]], return_tensors="pt")
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        outputs = model(**inputs.to(self.device, torch.float32), multimask_output=False)
        masks = processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        return masks[0].reshape(image.shape[:3])  # of one image, one box, one mask

    def _best_box(self, image: Any, subject: str) -> list[float] | None:
        """Return left, top, right and bottom in pixels."""
        processor, model = self.detector
        text = subject.lower().rstrip(".") + "."
        inputs = processor(images=image, text=text, return_tensors="pt").to(self.device)
        found = processor.post_process_grounded_object_detection(
            model(**inputs),
            inputs["input_ids"],
            threshold=self.box_threshold,
            text_threshold=self.box_threshold,
            target_sizes=[(image.height, image.width)],
        )[0]
        if not len(found["scores"]):
            return None
        return found["boxes"][found["scores"].argmax()].tolist()


def _load(
    folder: str, flag: str, model_class: str, kinds: tuple[str, ...], device: torch.device
) -> tuple[Any, Any]:
    processor, model = load_with_processor(folder, flag, model_class, kinds, extra="train")
    return processor, model.to(device)
