"""The nodes that make adapters: by training, and fitted to a model."""

from typing import Any

from comfy_api.latest import io

from ..dreamcache_core import InputError
from ..dreamcache_core.images.loss_curve import draw_loss_curve
from ..dreamcache_core.method.cache import LATENT_FACTOR
from .host.model import default_side_px
from .host.report import describe_adapters, node_id, report
from .host.training.fit import fit_to_model
from .host.training.loop import DivergedError, train
from .host.training.run import MAX_PX, MIN_PX, TrainingRun
from .sockets import PERSONALIZE, Adapters, advanced, found_by, mask_marks_input, seed_input

LISTS = ("images", "masks", "captions", "conditioning")
"""Inputs that may hold several things; of the others the first counts."""


class ModelAdapters(io.ComfyNode):
    """Fit adapters to a model, without training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the node."""
        return io.Schema(
            node_id="DreamCacheModelAdapters",
            display_name="Adapters from Model (DreamCache)",
            category="DreamCache",
            description="Makes adapters of the model's own self-attention: for any Stable Diffusion 1.5, 2.1 or SDXL model, "
            "without a file and without training. Trained adapters keep more of the subject.",
            **found_by("no download", *PERSONALIZE),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that will generate; LoRAs on it count. It stays as it is.",
                ),
                io.Clip.Input("clip", tooltip="The model's CLIP."),
                advanced(
                    seed_input(
                        "The same model and seed give the same adapters. Another one hardly differs."
                    )
                ),
                advanced(
                    io.Int.Input(
                        "size",
                        default=0,
                        min=0,
                        max=MAX_PX,
                        step=8,
                        optional=True,
                        tooltip="Side in pixels of the images that the model draws for it. 0: 512, for SDXL 1024.",
                    )
                ),
            ],
            outputs=[
                Adapters.Output(
                    display_name="adapters",
                    tooltip="For Apply DreamCache, Save DreamCache Adapters, or to train on from. Encode Reference must have "
                    "their timestep.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, seed: int, size: int = 0) -> io.NodeOutput:
        """Fit."""
        size_px = size or default_side_px(model)
        if size_px < MIN_PX or size_px % LATENT_FACTOR:
            raise InputError(
                f"size must be 0 or a multiple of {LATENT_FACTOR} from {MIN_PX} on; given {size}."
            )
        adapters = fit_to_model(model, clip, size_px=size_px, seed=seed, node_id=node_id(cls))
        return io.NodeOutput(adapters, ui=report(cls, describe_adapters(adapters)))


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
        data = run.encode()
        try:
            train(run.model, adapters, data, run.settings, run.after_step, run.after_pass)
            run.write_record(adapters)
            curve = draw_loss_curve(run.losses)
            shown = report(cls, run.describe(adapters))
        except DivergedError as error:
            raise run.diverged(adapters, error.num_updates) from error
        except BaseException:
            run.save_interrupted(adapters)
            raise
        return io.NodeOutput(adapters, curve, ui=shown)


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


NODES: list[type[io.ComfyNode]] = [ModelAdapters, TrainAdapters]
