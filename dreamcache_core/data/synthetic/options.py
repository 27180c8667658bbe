"""What a synthetic training set is built from and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ...config import Config
from ...errors import InputError
from .quality import QualityLimits
from .text_to_image import AUTO_CLASS


def _flag(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class BuildOptions(Config):
    """Build a training set from captions: generate images, cut out their subjects, keep what is fit.

    Give the same command again to go on after an interruption; several processes share the work under
    ``accelerate launch -m dreamcache_core dataset build ...`` and make the same set as one.
    """

    out: str = field(metadata={"help": "folder of the set: new, empty, or an interrupted build"})
    model: str = field(metadata={"help": "diffusers folder of a text-to-image model, local"})
    segmenter_model: str = field(metadata={"help": "folder of CLIPSeg or SAM, local"})
    segmenter: Literal["clipseg", "grounded-sam"] = _flag(
        "what finds the subject: CLIPSeg, or Grounding DINO and SAM", "clipseg"
    )
    detector_model: str | None = _flag("grounded-sam: folder of Grounding DINO, local")
    captions: str | None = _flag(
        "text file, a caption or subject<TAB>caption per line; else subjects x contexts"
    )
    subjects: str | None = _flag("text file, a subject per line; else the list that ships")
    contexts: str | None = _flag("text file, a context per line; else the list that ships")
    count: int | None = _flag("samples to make, rejected ones included; else one per caption")
    seed: int = _flag("of the noise, and of the order of subjects x contexts", 0)
    form: Literal["folder", "shards"] = _flag(
        "a folder per subject, or WebDataset shards", "folder"
    )
    shard_size: int = _flag("shards: samples to a shard, rejected ones included", 1000)
    pipeline_class: str = _flag("class of diffusers that loads the model", AUTO_CLASS)
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = _flag(
        "float type of the model; auto: float16 on a GPU, else float32", "auto"
    )
    width: int | None = _flag("of the images, pixels; else the model's")
    height: int | None = _flag("of the images, pixels; else the model's")
    cfg: float = _flag("pull of the caption", 3.5)
    steps: int = _flag("sampling steps", 25)
    negative: str | None = _flag("what the images should avoid")
    batch_size: int = _flag("images generated at once", 1)
    mask_threshold: float = _flag("clipseg: probability of a pixel of the subject", 0.5)
    box_threshold: float = _flag("grounded-sam: least score of the subject's box", 0.25)
    min_area: float = _flag("least share of the image that the subject takes", 0.02)
    max_area: float = _flag("greatest share of the image", 0.8)
    min_main_share: float = _flag("least share of the mask in its largest connected part", 0.9)
    allow_border: bool = _flag("keep subjects that touch the image's border", False)
    cpu: bool = _flag("use the CPU even where there is a GPU", False)

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            InputError: A number is out of range, or options do not go together.
        """
        _ = self.limits
        for name in ("count", "shard_size", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"Expected {name} to be at least 1, got {value}.")
        if self.seed < 0:
            raise InputError(f"Expected seed to be at least 0, got {self.seed}.")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and (value < 8 or value % 8):
                raise InputError(f"Expected {name} to be a multiple of 8 pixels, got {value}.")
        for name in ("mask_threshold", "box_threshold"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"Expected {name} in (0, 1), got {getattr(self, name)}.")
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
