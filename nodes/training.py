"""The nodes that make adapters: by training, and fitted to a model."""

from typing import Any

from comfy_api.latest import io

from ..dreamcache_core import InputError
from ..dreamcache_core.images.loss_curve import draw_loss_curve
from ..dreamcache_core.pipeline.latents import LATENT_FACTOR
from .host.report import describe_adapters, node_id, report
from .host.training.fit import fit_to_model
from .host.training.loop import DivergedError, train
from .host.training.run import MAX_PX, MIN_PX, TrainingRun, default_side_px
from .types import Adapters

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
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that will generate; LoRAs on it count. It stays as it is.",
                ),
                io.Clip.Input("clip", tooltip="The model's CLIP, for the empty prompt."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="The same model and seed give the same adapters. The choice matters little.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=MAX_PX,
                    step=8,
                    optional=True,
                    tooltip="Side in pixels of the images that the model draws for it. 0: 512, for SDXL 1024.",
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
            category="DreamCache",
            description="Trains adapters for this model from images with subject masks and captions: for Stable "
            "Diffusion 1.5, SDXL and fine-tunes, for which none are published, or to go on from some. When it is "
            "cancelled, what was learned so far is kept in models/dreamcache.",
            is_input_list=True,
            inputs=_inputs(),
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
            train(run.model, adapters, data, run.settings, run.after_step)
            run.write_record(adapters)
            curve = draw_loss_curve(run.losses)
            shown = report(cls, run.describe(adapters))
        except DivergedError as error:
            raise run.diverged(adapters, error.num_updates) from error
        except BaseException:
            run.save_interrupted(adapters)
            raise
        return io.NodeOutput(adapters, curve, ui=shown)


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model",
            tooltip="The model that the adapters are for. It is not changed. LoRAs on it count.",
        ),
        io.Vae.Input("vae", tooltip="The model's VAE."),
        io.Clip.Input(
            "clip", tooltip="The model's CLIP: it encodes the captions and the empty prompt."
        ),
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
        io.Int.Input(
            "steps",
            default=1000,
            min=1,
            max=1_000_000,
            tooltip="Optimizer steps. The paper took 25,000 at batch 128, on 400,000 images.",
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
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="The same inputs and seed give the same adapters.",
        ),
        io.Combo.Input(
            "init",
            options=["identity", "self_attention", "paper"],
            default="identity",
            tooltip="Start values. 'identity': training starts at exactly the plain model. 'self_attention': so too, and the "
            "adapters look at the reference as the model looks at its own image. 'paper': everything random. "
            "Without effect when adapters is connected.",
        ),
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="Where the subject of each image is. Without them all of the image counts as the subject, and "
            "backgrounds leak into the results.",
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
        io.Combo.Input(
            "mask_marks",
            options=["subject", "background"],
            default="subject",
            optional=True,
            tooltip="What 1 in the masks marks. 'subject' for what you painted in the MaskEditor (its MASK marks what was "
            "painted); 'background' for Load Image's mask of a cut-out PNG.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.07,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Advanced: share of samples that are trained with the empty prompt. 0.07 is the paper's.",
        ),
        io.Int.Input(
            "resolution",
            default=0,
            min=0,
            max=2048,
            step=64,
            optional=True,
            tooltip="Advanced: side of the images in training, pixels. 0 is the model's: 512, for SDXL 1024.",
        ),
        io.Boolean.Input(
            "buckets",
            default=False,
            optional=True,
            tooltip="Advanced: keep the aspect of images that are not square (in sizes of equal area) instead of "
            "cutting the middle square out.",
        ),
        io.Int.Input(
            "reference_variants",
            default=32,
            min=1,
            max=10_000,
            optional=True,
            tooltip="Advanced: how many differently cut-out references of each image are made before training. They "
            "come round again after as many epochs.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=False,
            optional=True,
            tooltip="Advanced: less memory on the GPU for about a fifth more time. Changes nothing else.",
        ),
        io.Boolean.Input(
            "mirror_references",
            default=True,
            optional=True,
            tooltip="Advanced: exchange left and right in half of the references, as the paper does. Off for lettering and "
            "for subjects that must not come out mirrored.",
        ),
    ]


NODES: list[type[io.ComfyNode]] = [ModelAdapters, TrainAdapters]
