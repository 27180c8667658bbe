"""What a synthetic training set is built from and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...config import Config, check_range
from ...errors import InputError
from .quality import QualityLimits
from .segmentation import check_thresholds
from .text_to_image import AUTO_CLASS


@dataclass(frozen=True)
class BuildOptions(Config):
    """Build a training set from captions, and keep what is fit of it.

    Give the same command again to go on after an interruption.

    Several processes share the work under ``accelerate launch``, and make the same.

    Attributes:
        out: Folder of the set: new, empty, or an interrupted build.
        model: Diffusers folder of a text-to-image model, local.
        segmenter_model: Folder of CLIPSeg or SAM, local.
        segmenter: What finds the subject: CLIPSeg, or Grounding DINO and SAM.
        detector_model: With grounded-sam: folder of Grounding DINO, local.
        captions: Text file, a caption or subject, tab and caption, per line; else subjects x contexts.
        subjects: Text file, a subject per line; else the list that ships.
        contexts: Text file, a context per line; else the list that ships.
        count: Samples to make, rejected ones included; else one per caption.
        seed: Seed of the noise, and of the order of subjects x contexts.
        form: A folder per subject, or WebDataset shards.
        shard_size: Samples to a shard, rejected ones included.
        pipeline_class: Class of diffusers that loads the model.
        dtype: Float type of the model; auto: float16 on a GPU, else float32.
        width: Width of the images, pixels; else the model's.
        height: Height of the images, pixels; else the model's.
        cfg: Pull of the caption.
        steps: Sampling steps.
        negative: What the images should avoid.
        batch_size: Images generated at once.
        mask_threshold: With clipseg: least probability of a pixel of the subject.
        box_threshold: With grounded-sam: least score of the subject's box.
        min_area: Least share of the image that the subject takes.
        max_area: Greatest share of the image.
        min_main_share: Least share of the mask in its largest connected part.
        allow_border: Keep subjects that touch the image's border.
        rejected: Folder to keep rejected images in, each beside its mask, to set the limits by.
        cpu: Use the CPU even where there is a GPU.
    """

    out: str
    model: str
    segmenter_model: str
    segmenter: Literal["clipseg", "grounded-sam"] = "clipseg"
    detector_model: str | None = None
    captions: str | None = None
    subjects: str | None = None
    contexts: str | None = None
    count: int | None = None
    seed: int = 0
    form: Literal["folder", "shards"] = "folder"
    shard_size: int = 1000
    pipeline_class: str = AUTO_CLASS
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    width: int | None = None
    height: int | None = None
    cfg: float = 3.5
    steps: int = 25
    negative: str | None = None
    batch_size: int = 1
    mask_threshold: float = 0.5
    box_threshold: float = 0.25
    min_area: float = 0.02
    max_area: float = 0.8
    min_main_share: float = 0.9
    allow_border: bool = False
    rejected: str | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            InputError: A number is out of range, or options do not go together.
        """
        _ = self.limits
        lowest = {"count": 1, "shard_size": 1, "steps": 1, "batch_size": 1, "seed": 0}
        for name, low in lowest.items():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low)
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and (value < 8 or value % 8):
                raise InputError(f"Expected {name} to be a multiple of 8 pixels, got {value}.")
        check_thresholds(self.mask_threshold, self.box_threshold)
        if self.captions is not None and (self.subjects, self.contexts) != (None, None):
            raise InputError("Give captions, or lists of subjects and contexts; got both.")
        if (self.segmenter == "grounded-sam") != (self.detector_model is not None):
            raise InputError(
                f"Expected detector_model, a folder of Grounding DINO, with the segmenter grounded-sam alone; got "
                f"{self.detector_model!r} with {self.segmenter}."
            )

    @property
    def limits(self) -> QualityLimits:
        """What masks must keep to."""
        return QualityLimits(self.min_area, self.max_area, self.min_main_share, self.allow_border)
