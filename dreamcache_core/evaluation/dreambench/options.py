"""What ``dreamcache evaluate dreambench`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...config import Config
from ...errors import InputError
from ...pipeline.generate import GenerateOptions


def _flag(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DreamBenchOptions(Config):
    """Judge images of DreamBench's subjects by DINO, CLIP-I and CLIP-T, or generate and judge them.

    Give the same command again to go on after an interruption; several processes share the work under
    ``accelerate launch -m dreamcache_core evaluate dreambench ...``.
    """

    dataset: str = field(metadata={"help": "folder with a folder of images for each subject"})
    out: str = field(metadata={"help": "folder for scores, tables and report"})
    dino: str = field(metadata={"help": "folder of DINO ViT-S/16, local"})
    clip: str = field(metadata={"help": "folder of CLIP ViT-B/32, local"})
    images: str | None = _flag("folder of images to judge: SUBJECT/PROMPT_IMAGE.png, from 0")
    generate: bool = _flag("generate the images, into --out, with --model and --adapters", False)
    subjects: list[str] = field(
        default_factory=list[str], metadata={"help": "names of subjects; else all"}
    )
    subject_list: str | None = _flag("CSV: subject,class,kind[,reference]; else that of DreamBench")
    object_prompts: str | None = _flag("text file, a prompt with {} for the class word per line")
    live_prompts: str | None = _flag("likewise, for live subjects")
    images_per_prompt: int = _flag("images for each prompt", 4)
    batch_size: int = _flag("images judged at once", 32)
    report_images: int = _flag("images of each prompt shown in the report", 1)
    cpu: bool = _flag("use the CPU even where there is a GPU", False)
    model: str | None = _flag("generate: diffusers folder or single-file checkpoint, local")
    model_config: str | None = _flag("generate, for a single file: diffusers folder of its family")
    adapters: str | None = _flag("generate: adapter file (.safetensors or released .pt)")
    negative: str = _flag("generate: what to avoid", "")
    image_guidance: float = _flag("generate: pull of the reference", 0.4)
    cfg: float = _flag("generate: pull of the prompt; 1 = off", 7.5)
    steps: int = _flag("generate: sampling steps", 50)
    seed: int = _flag("generate: seed of all noise", 0)
    size: int | None = _flag("generate: side in pixels of reference and images; else the model's")
    fill: float = _flag("generate: share of the side the subject takes in its reference", 0.85)
    scale: float = _flag("generate: strength of the adapters; 0 = plain model", 1.0)
    guidance: Literal["separate", "joint"] = _flag(
        "generate: joint: text and reference as one", "separate"
    )
    scheduler: Literal["ddim", "model"] = _flag("generate: ddim: as in the paper", "ddim")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = _flag(
        "generate: float type of the model; auto: float16 on a GPU, else float32", "auto"
    )

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            InputError: A number is out of range, or options do not go together.
        """
        if self.generate == (self.images is not None):
            raise InputError(
                "Expected either --images with a folder, or --generate; got "
                f"{'both' if self.generate else 'neither'}. Leave one out, or give one."
            )
        for name, least in (("images_per_prompt", 1), ("batch_size", 1), ("report_images", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"Expected {name} to be at least {least}, got {getattr(self, name)}."
                )
        if self.generate:
            if self.model is None or self.adapters is None:
                raise InputError("--generate needs --model and --adapters. Give both.")
            _ = self.generation(reference="reference", mask=None, prompt="prompt", seed=self.seed)

    @property
    def image_folder(self) -> Path:
        """Where the images are that are judged."""
        return Path(self.out if self.images is None else self.images)

    def generation(
        self, *, reference: str, mask: str | None, prompt: str, seed: int, device: str = "auto"
    ) -> GenerateOptions:
        """Return the options of one image, as ``dreamcache generate`` takes them.

        Args:
            reference: Image file.
            mask: Its mask.
            prompt: What to show.
            seed: Of the image.
            device: Where it is made.

        Raises:
            InputError: A number is out of range.
        """
        shared = ("negative", "image_guidance", "cfg", "steps", "size", "fill", "scale")
        names = (*shared, "guidance", "scheduler", "dtype", "out", "model", "adapters")
        return GenerateOptions.from_dict(
            {name: getattr(self, name) for name in names}
            | {"config": self.model_config, "reference": (reference,), "prompt": prompt}
            | {"mask": () if mask is None else (mask,), "seed": seed, "device": device}
        )
