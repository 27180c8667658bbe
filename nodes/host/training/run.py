"""One training run as the node sees it: what it starts from, what it shows, what it keeps."""

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io
from latent_preview import Latent2RGBPreviewer
from torch import Tensor

from ....dreamcache_core import (
    AdapterSet,
    DreamCacheError,
    InputError,
    StateError,
    __version__,
    save_adapters,
)
from ....dreamcache_core.data.augmentation import Alterations
from ....dreamcache_core.fitting.fit import DEFAULTS, NUM_PASSES, without_fit
from ....dreamcache_core.images.loss_curve import draw_loss_curve, moving_average
from ....dreamcache_core.images.sheets import contact_sheet
from ....dreamcache_core.images.tensors import image_to_tensor
from ....dreamcache_core.method.cache import LATENT_FACTOR
from ....dreamcache_core.training.initialisation import FITS, new_adapters
from ..folders import new_adapter_path
from ..model import default_side_px, model_layout, require_model_fit, unet_of
from ..report import PREVIEW_PX, node_id, preview, report, show
from .frozen_model import check_texts, noise_schedule
from .images import (
    TrainingSet,
    encode_pairs,
    encode_texts,
    make_pairs,
    match_captions,
    split_conditioning,
)
from .loop import TrainSettings

logger = logging.getLogger(__name__)

RESCUED = "dreamcache-interrupted"
NUM_PREVIEWS = 100
MIN_PX, MAX_PX = 64, 2048
BACKGROUNDS_COME_ALONG = "their backgrounds will come through in the results"


@dataclass(eq=False)
class TrainingRun:
    """One execution of the node: its inputs, and what becomes of them; the fields are the node's inputs."""

    node: type[io.ComfyNode]
    model: Any
    vae: Any
    clip: Any
    images: list[Tensor]
    captions: list[str]
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    init: Any
    masks: list[Tensor] = field(default_factory=list[Tensor])
    conditioning: list[Any] = field(default_factory=list[Any])
    adapters: AdapterSet | None = None
    mask_marks: str = "auto"
    caption_dropout: float = 0.07
    resolution: int = 0
    buckets: bool = False
    reference_variants: int = 32
    gradient_checkpointing: bool = False
    mirror_references: bool = True

    def __post_init__(self) -> None:
        self.masks = [mask for mask in self.masks if mask is not None]
        self.conditioning = [texts for texts in self.conditioning if texts is not None]
        self.resolution = self.resolution or default_side_px(self.model)
        if self.resolution % LATENT_FACTOR or not MIN_PX <= self.resolution <= MAX_PX:
            raise InputError(
                f"Expected resolution to be a multiple of {LATENT_FACTOR} in {MIN_PX} ... {MAX_PX} pixels, or 0 for the "
                f"model's, given {self.resolution}. Use 512 for Stable Diffusion 1.5, 1024 for SDXL."
            )
        self.losses: list[float] = []
        self.num_updates = 0
        self.num_images = sum(len(batch) for batch in self.images)
        if not self.num_images:
            raise InputError("Expected images to train on, given none. Connect images.")
        self.num_masks, self.about_masks = 0, ""
        self.last_told_s = -math.inf
        self.sample: Tensor | None = None
        # one for each time that an image is seen, up to the limit
        num_epochs = math.ceil(self.steps * self.batch_size / self.num_images)
        self.num_variants = max(1, min(self.reference_variants, num_epochs))
        self.settings = TrainSettings(
            self.steps,
            self.batch_size,
            self.learning_rate,
            self.seed,
            self.caption_dropout,
            self.gradient_checkpointing,
            self.init if self.adapters is None else "adapters",
        )
        self.num_prepared = self.num_images * self.num_variants
        if self.settings.init in FITS:
            self.num_prepared += NUM_PASSES
        self.bar = comfy.utils.ProgressBar(
            self.num_prepared + self.steps, node_id=node_id(self.node)
        )

    @torch.inference_mode(False)
    def initial_adapters(self) -> AdapterSet:
        """Make untrained adapters, or copy those to go on from."""
        prediction = noise_schedule(self.model).prediction
        if self.adapters is None:
            return new_adapters(
                unet_of(self.model),
                init=self.init,
                seed=self.seed,
                timestep=DEFAULTS.timestep,
                prediction=prediction,
            )
        info = self.adapters.info
        require_model_fit(self.model, info.layout)
        if info.prediction != prediction:
            logger.warning(
                "The adapters were trained on a model that predicts %s; this one predicts %s.",
                info.prediction,
                prediction,
            )
        with torch.device("meta"):
            copy = AdapterSet(replace(info, prediction=prediction))
        state = {k: v.detach().cpu().float().clone() for k, v in self.adapters.state_dict().items()}
        copy.load_state_dict(state, assign=True)
        return copy

    def encode(self) -> TrainingSet:
        """Pair, check and encode images and texts; what can be refused is refused before the long part."""
        if self.clip is None:
            raise InputError(
                "Train DreamCache Adapters needs clip for the empty prompt; the loader gave none. Connect a CLIP loader "
                "with this model's text encoder."
            )
        has_captions = not self.conditioning
        captions = [""] * self.num_images
        if has_captions:
            captions = match_captions(self.captions, self.num_images)
        pairs, notes = make_pairs(self.images, self.masks, captions, self.mask_marks)
        self.num_masks = sum(pair.mask is not None for pair in pairs)
        self.about_masks = ", ".join([f"{self.num_masks} with mask", *notes])
        if has_captions:
            texts = encode_texts(self.clip, captions)
        else:
            texts = split_conditioning(self.conditioning, self.num_images)
        texts = [*texts, *encode_texts(self.clip, [""])]
        check_texts(texts, model_layout(self.model))
        return encode_pairs(
            pairs,
            texts,
            self.vae,
            channels=self.model.model.latent_format.latent_channels,
            resolution=self.resolution,
            has_buckets=self.buckets,
            num_variants=self.num_variants,
            seed=self.seed,
            show=self.show_pair,
            alterations=Alterations(flip=self.mirror_references),
        )

    def show_pair(self, target: Tensor, reference: Tensor) -> None:
        """Preview a target beside its reference, as training sees them."""
        sheet = contact_sheet([[target, reference]], cell_px=PREVIEW_PX // 2)
        self.bar.update_absolute(self.bar.current + 1, preview=preview(sheet))
        self._tell(
            f"making references: {self.bar.current} of {self.num_images * self.num_variants}"
        )

    def after_pass(self) -> None:
        """Count a pass that fits the start."""
        self.bar.update(1)
        done = self.bar.current - self.num_images * self.num_variants
        self._tell(f"fitting to the model: pass {done} of {NUM_PASSES}")

    def after_step(self, loss: float, num_updates: int) -> None:
        """Note the loss and preview its course; ComfyUI interrupts here."""
        self.losses.append(loss)
        self.num_updates = num_updates
        done = len(self.losses)
        has_preview = done % max(1, self.steps // NUM_PREVIEWS) == 0
        shown = None
        if has_preview:
            above = [] if self.sample is None else [self.sample]
            width = above[0].shape[2] if above else PREVIEW_PX
            shown = preview(torch.cat([*above, draw_loss_curve(self.losses, width=width)], dim=1))
        self.bar.update_absolute(self.num_prepared + done, preview=shown)
        self._tell(f"step {done} of {self.steps}, loss {loss:.4g}")

    def show_sample(self, latents: Sequence[Tensor]) -> None:
        """Preview a reference, what is drawn without and with it, side by side in rough colours."""
        form = self.model.model.latent_format
        previewer = Latent2RGBPreviewer(
            form.latent_rgb_factors, getattr(form, "latent_rgb_factors_bias", None)
        )
        tiles = [image_to_tensor(previewer.decode_latent_to_preview(each)) for each in latents]
        captions = [["reference", "without", f"with, step {len(self.losses)}"]]
        self.sample = contact_sheet([tiles], captions, cell_px=PREVIEW_PX // len(tiles))
        self.bar.update_absolute(self.bar.current, preview=preview(self.sample))

    def _tell(self, phase: str) -> None:
        """Show what is being done, at most once a second, with what is wrong about the masks."""
        now = time.monotonic()
        if now - self.last_told_s < 1:
            return
        self.last_told_s = now
        num_bare = self.num_images - self.num_masks
        bare = f"; {num_bare} of {self.num_images} images have no mask: {BACKGROUNDS_COME_ALONG}"
        show(phase + (bare if num_bare else ""), node_id(self.node))

    def write_record(self, adapters: AdapterSet) -> None:
        """Write into the adapters how they were trained."""
        record = {
            **asdict(self.settings),
            "step": self.num_updates,
            "loss": moving_average(self.losses)[-1],
            "optimizer": "AdamW",
            "resolution": self.resolution,
            "buckets": self.buckets,
            "reference_variants": self.num_variants,
            "mirror_references": self.mirror_references,
            "images": self.num_images,
            "masks": self.num_masks,
        }
        before = adapters.info.extra.get("training")
        if self.adapters is not None and before is not None:
            record["before"] = before
        extra = {
            **without_fit(adapters.info.extra),
            "training": json.dumps(record),
            "dreamcache_version": __version__,
        }
        adapters.info = replace(adapters.info, extra=extra)

    def save_interrupted(self, adapters: AdapterSet) -> str | None:
        """Save what was learned before the run broke off, if anything; say where."""
        if not self.num_updates:
            show(
                "ended before the first step: nothing was learned, nothing is kept",
                node_id(self.node),
            )
            return None
        try:
            self.write_record(adapters)
        except Exception:  # whatever it is: the weights matter more
            logger.exception("How the adapters were trained could not be written into them.")
        try:
            with new_adapter_path(RESCUED) as path:
                save_adapters(adapters, path)
        except (DreamCacheError, OSError):
            logger.exception("The adapters of the interrupted training could not be kept.")
            return None
        text = (
            f"Training ended after {self.num_updates} of {self.steps} steps. What it learned is kept in {path}: Load "
            "DreamCache Adapters lists it after R, and its output goes on from there when connected to adapters. Delete "
            "the file if you do not need it."
        )
        logger.warning(text)
        report(self.node, text)
        return path

    def diverged(self, adapters: AdapterSet, num_updates: int) -> StateError:
        """Explain a loss that is not finite; of the updates, the adapters hold so many."""
        self.num_updates = num_updates
        step = len(self.losses) + 1
        start = f"The loss of step {step} is NaN or infinite, so training was stopped."
        path = self.save_interrupted(adapters)
        if step == 1:
            return StateError(
                f"{start} Before the first step that is not the learning rate: half precision overflowed, or model, VAE and "
                "images do not fit. Load the model in another precision and look at the images."
            )
        kept = ""
        if not num_updates:
            kept = " No adapters are kept: the first step already broke them."
        elif path is not None:
            kept = f" The adapters after step {num_updates}, the last whose loss was finite, are in {path}."
        return StateError(
            f"{start} The learning rate {self.learning_rate:g} is too high; try {self.learning_rate / 10:g}.{kept}"
        )

    def describe(self, adapters: AdapterSet) -> str:
        """One line for the node."""
        last = moving_average(self.losses)[-1]
        return (
            f"{len(self.losses)} steps on {self.num_images} images ({self.about_masks}), average loss at the end {last:.4g}; "
            f"for {adapters.info.layout.describe()}"
        )
