"""The nodes that train adapters, and read what they are trained on."""

from typing import Any

import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from torch import Tensor

from ..dreamcache_core import DreamCacheError, InputError
from ..dreamcache_core.data.checking import is_full, training_sheet
from ..dreamcache_core.data.sources.opening import open_source
from ..dreamcache_core.data.sources.source import Pair, PairSource
from ..dreamcache_core.images.loss_curve import draw_loss_curve
from .host.folders import check_choice, choice_state, list_set_folders, set_files, set_folder
from .host.report import node_id, report
from .host.training.loop import DivergedError, train
from .host.training.run import TrainingRun
from .sockets import (
    PERSONALIZE,
    SUBJECT,
    Adapters,
    advanced,
    found_by,
    mask_marks_input,
    seed_input,
)

SHEET_PX = 512
NUM_SHOWN = 8
"""Images in the sheet of a training set."""

NUM_NAMED = 3
"""Images left out of a training set that its node names."""

LISTS = ("images", "masks", "captions", "conditioning")
"""Inputs that may hold several things; of the others the first counts."""


class LoadTrainingSet(io.ComfyNode):
    """Read images, masks and captions of a folder, each image with its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheLoadTrainingSet",
            display_name="Load Training Set (DreamCache)",
            category="DreamCache/training",
            description="Loads a folder of training images from ComfyUI's input folder, each with its caption (x.png with x.txt) "
            "and, where there is one, its mask (masks/x.png), and shows what training will see.",
            **found_by("dataset", "kohya", "folder", "captions", *SUBJECT),
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list_set_folders(),
                    tooltip="Folder below ComfyUI's input folder, with any folders in it. Press R after making a new one.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    optional=True,
                    tooltip="What images show that have no caption file. Empty: the name of a folder such as '10_red bag'.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="For Train DreamCache Adapters, in the order of their names.",
                ),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="The subject of each image; all of an image that has no mask.",
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="The caption of each image.",
                ),
                io.Image.Output(
                    display_name="sheet",
                    tooltip="Some of the images beside the references that training makes of them.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        """Say where folders belong when this one is not there."""
        return check_choice(set_files, folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, **_: Any) -> str:
        """Run again when a file comes, goes or changes."""
        return choice_state(set_files, folder)

    @classmethod
    def execute(cls, folder: str, caption: str = "") -> io.NodeOutput:
        """Read the set; what cannot be read is left out and named."""
        source = open_source(set_folder(folder), caption or None)
        bar = ProgressBar(len(source.keys), node_id=node_id(cls))
        pairs, left_out = _read_all(source, bar)
        if not pairs:
            raise InputError(f"No image of {folder} can be read: {left_out[0]}")
        masks = [_mask_of(pair) for pair in pairs]
        num_masked = sum(pair.mask is not None for pair in pairs)
        told = f"{len(pairs)} images, {num_masked} with a mask"
        if num_masked < len(pairs):
            told += " (the backgrounds of the others will come through in the results)"
        num_turned = sum(pair.is_turned for pair in pairs)
        if num_turned:
            told += f", {num_turned} of which marked the background and were turned round"
        num_full = sum(pair.mask is not None and is_full(pair.mask) for pair in pairs)
        if num_full:
            told += f"; {num_full} masks are white all over: their images' backgrounds will come through too"
        left_out = [*source.problems, *left_out]
        if left_out:
            told += f"; left out: {' '.join(left_out[:NUM_NAMED])}"
            if len(left_out) > NUM_NAMED:
                told += f" And {len(left_out) - NUM_NAMED} more."
        sheet = training_sheet(source, resolution=SHEET_PX, num_samples=NUM_SHOWN)
        assert sheet is not None
        shown = report(cls, told).as_dict() | ui.PreviewImage(sheet, cls=cls).as_dict()
        images, captions = [pair.target for pair in pairs], [pair.caption for pair in pairs]
        return io.NodeOutput(images, masks, captions, sheet, ui=shown)


class TrainAdapters(io.ComfyNode):
    """Train adapters on images with masks and captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheTrainAdapters",
            display_name="Train DreamCache Adapters",
            category="DreamCache/training",
            description="Trains adapters for this model from images with subject masks and captions: for Stable "
            "Diffusion 1.5, SDXL and fine-tunes, for which none are published, or to go on from some. When it is "
            "cancelled, what was learned so far is kept in models/dreamcache.",
            **found_by("fine-tune", "lora training", *PERSONALIZE),
            is_input_list=True,
            inputs=[
                *_model_and_images(),
                *_course(),
                *_more_of_images(),
                *map(advanced, _fine_points()),
            ],
            outputs=[
                Adapters.Output(
                    display_name="adapters",
                    tooltip="For Apply DreamCache and Save DreamCache Adapters.",
                ),
                io.Image.Output(
                    display_name="loss_curve", tooltip="The loss of each step and its average."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **inputs: list[Any]) -> io.NodeOutput:
        """Train."""
        given: dict[str, Any] = {
            name: value if name in LISTS else value[0] for name, value in inputs.items()
        }
        run = TrainingRun(cls, **given)
        adapters = run.initial_adapters()
        try:
            data = run.encode()
            train(
                run.model,
                adapters,
                data,
                run.settings,
                run.after_step,
                run.after_pass,
                run.show_sample,
            )
            run.write_record(adapters)
            curve = draw_loss_curve(run.losses)
            shown = report(cls, run.describe(adapters))
        except DivergedError as error:
            raise run.diverged(adapters, error.num_updates) from error
        except BaseException:
            run.save_interrupted(adapters)
            raise
        return io.NodeOutput(adapters, curve, ui=shown)


def _read_all(source: PairSource, bar: ProgressBar) -> tuple[list[Pair], list[str]]:
    """Read the pairs of a set, and say why those are missing that cannot be read.

    Raises:
        InputError: An image's subject is another image, which this node's outputs have no place for.
    """
    pairs: list[Pair] = []
    left_out: dict[str, str] = {}  # a repeated image is named once
    for index, key in enumerate(source.keys):
        bar.update(1)
        try:
            pair = source.read(index)
        except DreamCacheError as error:
            left_out.setdefault(source.files(index)[0], f"{key}: {error}")
            continue
        if pair.has_own_subject:
            raise InputError(
                f"{key} shows its subject in an image of its own, which training inside ComfyUI does not take. Train such a "
                "set on the command line, see docs/training.md."
            )
        pairs.append(pair)
    return pairs, list(left_out.values())


def _mask_of(pair: Pair) -> Tensor:
    return torch.ones(pair.target.shape[:3]) if pair.mask is None else pair.mask


def _model_and_images() -> list[io.Input]:
    """Declare what is trained, and on what."""
    return [
        io.Model.Input(
            "model",
            tooltip="The model that the adapters are for. It is not changed. LoRAs on it count.",
        ),
        io.Vae.Input("vae", tooltip="The model's VAE."),
        io.Clip.Input("clip", tooltip="The model's CLIP."),
        io.Image.Input(
            "images",
            tooltip="The training images: a batch, or a list such as the core's dataset loaders give, with images "
            "of different sizes.",
        ),
        io.String.Input(
            "captions",
            default="",
            multiline=True,
            tooltip="What each image shows: one line for each image, in their order, or one line for all. Or a "
            "list of texts from a dataset loader.",
        ),
    ]


def _course() -> list[io.Input]:
    """Declare how long and how fast it is trained, and from where."""
    return [
        io.Int.Input(
            "steps",
            default=1000,
            min=1,
            max=1_000_000,
            tooltip="How long to train. The paper took 25,000 steps at batch 128, on 400,000 images.",
        ),
        io.Int.Input(
            "batch_size",
            default=4,
            min=1,
            max=1024,
            tooltip="Images of a step. More is steadier and takes more memory and time.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0001,
            min=0.0000001,
            max=1.0,
            step=0.0000001,
            tooltip="How far each step goes. 0.0001 suits small sets and short runs, 0.00001 is the paper's for long "
            "ones. Too high, and the loss rises or becomes NaN.",
        ),
        seed_input("The same inputs and seed give the same adapters."),
        io.Combo.Input(
            "init",
            options=["fitted", "self_attention", "identity", "paper"],
            default="fitted",
            tooltip="Start values. 'fitted': as Adapters from Model makes them, the subject shows from the first step on. "
            "'self_attention': so too, but the subject shows only as it is learned. 'identity': nothing but the plain model. "
            "'paper': everything random. Without effect when adapters is connected.",
        ),
    ]


def _more_of_images() -> list[io.Input]:
    """Declare what may come with the images, and what to go on from."""
    return [
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="Where the subject of each image is. Without them all of the image counts as the subject, and "
            "backgrounds come through in the results.",
        ),
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            tooltip="Encoded captions, one for each image, as some dataset loaders give them. Replaces captions.",
        ),
        Adapters.Input(
            "adapters",
            optional=True,
            tooltip="Adapters to go on from, for the same kind of model. They are not changed.",
        ),
        mask_marks_input(),
    ]


def _fine_points() -> list[io.Input]:
    """Declare what seldom needs another value."""
    return [
        io.Float.Input(
            "caption_dropout",
            default=0.07,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Share of samples that are trained with the empty prompt. 0.07 is the paper's.",
        ),
        io.Int.Input(
            "resolution",
            default=0,
            min=0,
            max=2048,
            step=64,
            optional=True,
            tooltip="Side of the images in training, pixels. 0 is the model's: 512, for SDXL 1024.",
        ),
        io.Boolean.Input(
            "buckets",
            default=False,
            optional=True,
            tooltip="Keep the aspect of images that are not square (in sizes of equal area) instead of cutting the middle "
            "square out.",
        ),
        io.Int.Input(
            "reference_variants",
            default=32,
            min=1,
            max=10_000,
            optional=True,
            tooltip="How many differently cut-out references of each image are made before training. They come round again "
            "after as many epochs.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=False,
            optional=True,
            tooltip="Less memory on the GPU for about a fifth more time. Changes nothing else.",
        ),
        io.Boolean.Input(
            "mirror_references",
            default=True,
            optional=True,
            tooltip="Exchange left and right in half of the references, as the paper does. Off for lettering and for subjects "
            "that must not come out mirrored.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [LoadTrainingSet, TrainAdapters]
