"""All commands: what each is told, and what it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

from ..config import Config
from ..data.masking import MaskOptions
from ..data.precomputed.encoding import EncodeOptions
from ..data.synthetic.options import BuildOptions
from ..demo.options import DemoOptions
from ..evaluation.dreambench.options import DreamBenchOptions
from ..pipeline.generate import GenerateOptions
from ..training.config import TrainConfig
from . import (
    convert,
    dataset,
    dataset_check,
    demo,
    evaluate,
    fit,
    generate,
    inspect,
    train,
)
from .parsing import annotated_form, errors_as_exceptions, require_tyro


@dataclass(frozen=True)
class Command:
    """What follows the program's name.

    Attributes:
        options: What it is told.
        run: What it does.
        is_positional: Options without a default are given by position, not as flags.
        first: Option that a first word without a flag is for; empty: there is none.
    """

    options: type[Config]
    run: Callable[[Any], None]
    is_positional: bool = False
    first: str = ""


@dataclass(frozen=True)
class Group:
    """Commands with a word in common, or all of them."""

    description: str
    commands: Mapping[str, Command | Group]


PROGRAM = Group(
    "Personalised images from one image of a subject.",
    {
        "demo": Command(DemoOptions, demo.run),
        "generate": Command(GenerateOptions, generate.run),
        "inspect": Command(inspect.InspectOptions, inspect.run, is_positional=True),
        "convert": Command(convert.ConvertOptions, convert.run, is_positional=True),
        "fit": Command(fit.FitOptions, fit.run),
        "train": Command(TrainConfig, train.run, first="data"),
        "dataset": Group(
            "Build, mask, check, precompute or pack a training set.",
            {
                "build": Command(BuildOptions, dataset.run_build),
                "check": Command(dataset_check.CheckOptions, dataset_check.run, first="path"),
                "encode": Command(EncodeOptions, dataset.run_encode),
                "masks": Command(MaskOptions, dataset.run_masks, first="path"),
                "shard": Command(dataset.ShardOptions, dataset.run_shard, is_positional=True),
            },
        ),
        "evaluate": Group(
            "Measure how well images keep to their subject and prompt.",
            {"dreambench": Command(DreamBenchOptions, evaluate.run)},
        ),
    },
)


def show_commands(group: Group, argv: Sequence[str], *, program: str) -> None:
    """Print help or a script for the shell's completion, as ``argv`` asks for.

    Args:
        group: What there is to choose from.
        argv: Arguments none of which is a command.
        program: Program and group, for the help text.

    Raises:
        InputError: They ask for neither.
        SystemExit: Printed (code 0).
    """
    with errors_as_exceptions():
        require_tyro().cli(
            _union(group), prog=program, description=group.description, args=list(argv)
        )


def _union(group: Group) -> Any:
    """Return what tyro is given for a choice; it wants two members at least."""
    none = Annotated[None, require_tyro().conf.Suppress]
    return Union[(*_members(group), none)]  # pyright: ignore[reportInvalidTypeForm]


def _members(group: Group) -> Iterator[Any]:
    subcommand = require_tyro().conf.subcommand
    for name, entry in group.commands.items():
        if isinstance(entry, Group):
            yield Annotated[_union(entry), subcommand(name, description=entry.description)]
        else:
            line, *_ = (entry.options.__doc__ or "").splitlines()
            marker = subcommand(name, description=line)
            yield annotated_form(entry.options, entry.is_positional, marker)
