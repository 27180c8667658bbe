"""What ``dreamcache evaluate dreambench`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...config import Config
from ...errors import InputError
from ...pipeline.generate import GenerateOptions


@dataclass(frozen=True)
class DreamBenchOptions(Config):
    """Judge images of DreamBench's subjects, or generate and judge them.

    Give the same command again to go on after an interruption.

    Several processes share the work under ``accelerate launch``.

    Attributes:
        dataset: Folder with a folder of images for each subject.
        out: Folder for scores, tables and report.
        dino: Folder of DINO ViT-S/16, local.
        clip: Folder of CLIP ViT-B/32, local.
        images: Folder of images to judge: SUBJECT/PROMPT_IMAGE.png, from 0.
        generate: Generate the images, into --out, with --model.
        subjects: Names of subjects; else all.
        subject_list: CSV: subject,class,kind[,reference]; else that of DreamBench.
        object_prompts: Text file, a prompt with {} for the class word per line.
        live_prompts: The same for live subjects.
        images_per_prompt: Images for each prompt.
        batch_size: Images judged at once.
        report_images: Images of each prompt shown in the report.
        cpu: Use the CPU even where there is a GPU.
        model: With --generate: diffusers folder or single-file checkpoint, local.
        model_config: With --generate, for a single file not of Stable Diffusion 1.x or SDXL: diffusers folder like it.
        adapters: With --generate: adapter file (.safetensors or released .pt); without one, adapters
            are fitted to the model.
        negative: With --generate: what to avoid.
        image_guidance: With --generate: pull of the reference; 0.4 is the paper's.
        cfg: With --generate: pull of the prompt; 1 = off.
        steps: With --generate: sampling steps.
        seed: With --generate: seed of all noise.
        size: With --generate: side in pixels of reference and images; else the model's.
        fill: With --generate: share of the side the subject takes in its reference.
        scale: With --generate: strength of the adapters; 0 = plain model.
        guidance: With --generate: how prompt and reference pull; joint: as one.
        scheduler: With --generate: sampler; ddim: as in the paper.
        dtype: With --generate: float type of the model; auto: float16 on a GPU, else float32.
    """

    dataset: str
    out: str
    dino: str
    clip: str
    images: str | None = None
    generate: bool = False
    subjects: list[str] = field(default_factory=list[str])
    subject_list: str | None = None
    object_prompts: str | None = None
    live_prompts: str | None = None
    images_per_prompt: int = 4
    batch_size: int = 32
    report_images: int = 1
    cpu: bool = False
    model: str | None = None
    model_config: str | None = None
    adapters: str | None = GenerateOptions.adapters
    negative: str = GenerateOptions.negative
    image_guidance: float = 0.4
    cfg: float = GenerateOptions.cfg
    steps: int = GenerateOptions.steps
    seed: int = GenerateOptions.seed
    size: int | None = GenerateOptions.size
    fill: float = GenerateOptions.fill
    scale: float = GenerateOptions.scale
    guidance: Literal["separate", "joint"] = GenerateOptions.guidance
    scheduler: Literal["ddim", "model"] = GenerateOptions.scheduler
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = GenerateOptions.dtype

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
            if self.model is None:
                raise InputError("--generate needs --model.")
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
