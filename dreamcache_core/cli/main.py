"""The command line: ``dreamcache demo | generate | inspect | convert | train | dataset | evaluate``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import DreamCacheError, InputError
from ..files.tensor_file import FORMAT_KEY
from ..method.adapter import AdapterSet
from ..method.adapter_files import load_adapters, save_adapters
from ..pipeline.generate import DTYPES, GenerateOptions, generate
from ..version import __version__
from . import demo as demo_cli
from . import train as train_cli
from .dataset import add_dataset_commands
from .evaluate import add_evaluate_commands
from .inspection import describe_file, read_header


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``None`` takes those of the process.

    Returns:
        Exit code: 0 done, 2 bad input (one line on stderr says what), 130 interrupted.

    Raises:
        SystemExit: The flags are wrong (code 2), help was asked for (0), or ``dataset check`` found problems (1).
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return guarded(args.run, rest if args.takes_rest else args)


def guarded(run: Callable[[Any], None], given: Any) -> int:
    """Run a command; notes, warnings and errors become lines on stderr.

    Args:
        run: The command.
        given: Its argument.

    Returns:
        Exit code, see ``main``.
    """
    with _log_on_stderr():
        try:
            run(given)
        except (DreamCacheError, OSError) as error:
            return _fail(str(error))
        except torch.cuda.OutOfMemoryError:
            return _fail(
                "The device ran out of memory. Generating: --dtype float16 or a smaller --size; training: a smaller "
                "--batch_size, --gradient_checkpointing, or --mixed_precision bf16."
            )
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _StderrHandler(logging.Handler):
    """Shows each message of the package once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        line = f"{kind}: {record.getMessage()}"
        if line not in self.seen:
            self.seen.add(line)
            print(line, file=sys.stderr)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("dreamcache_core"), _StderrHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dreamcache", description="Personalised images from one image of a subject."
    )
    parser.add_argument("--version", action="version", version=f"dreamcache {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_demo,
        _add_generate,
        _add_inspect,
        _add_convert,
        _add_train,
        add_dataset_commands,
        add_evaluate_commands,
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[Any], None], help: str) -> Any:
    parser = commands.add_parser(
        name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run, takes_rest=False)
    return parser


# --- generate


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", _generate, "Generate images of a subject.")
    add = parser.add_argument
    add("--model", required=True, help="diffusers folder or single-file checkpoint, local")
    add("--config", help="for a single file: a local diffusers folder of the same family")
    add("--adapters", required=True, help="adapter file (.safetensors or released .pt)")
    add(
        "--reference",
        required=True,
        action="append",
        help="image of the subject; give it again for further images of the same subject",
    )
    add(
        "--mask",
        action="append",
        default=[],
        help="mask of the image, white = subject; without it, the image's alpha channel",
    )
    add("--prompt", required=True, help="what to show")
    add("--negative", default="", help="what to avoid")
    add("--out", required=True, help="folder for the images")
    add("--image-guidance", type=float, default=0.4, help="pull of the reference")
    add("--cfg", type=float, default=7.5, help="pull of the prompt; 1 = off")
    add("--steps", type=int, default=50, help="sampling steps")
    add("--seed", type=int, default=0, help="seed of the first image; the next adds 1")
    add("--count", type=int, default=1, help="number of images")
    add("--size", type=int, help="side in pixels of reference and images; else the model's")
    add("--fill", type=float, default=0.85, help="share of the side the subject takes")
    add("--scale", type=float, default=1.0, help="strength of the adapters; 0 = plain model")
    add(
        "--guidance",
        choices=("separate", "joint"),
        default="separate",
        help="joint: text and reference as one",
    )
    add(
        "--image-range",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("START", "END"),
        help="part of the run in which --image-guidance holds; outside it is 1, which is faster",
    )
    add("--scheduler", choices=("ddim", "model"), default="ddim", help="ddim: as in the paper")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="float type of the model")


def _generate(args: argparse.Namespace) -> None:
    generate(
        GenerateOptions.from_dict(
            {k: v for k, v in vars(args).items() if k not in ("run", "takes_rest")}
        )
    )


# --- train


def _add_train(commands: Any) -> None:
    # its flags are the fields of the configuration, which has a parser of its own
    parser = commands.add_parser("train", help="Train adapters.", add_help=False)
    parser.set_defaults(run=train_cli.run, takes_rest=True)


# --- demo


def _add_demo(commands: Any) -> None:
    text = "Draw subjects in new scenes with the small model that comes along."
    parser = commands.add_parser("demo", help=text, add_help=False)
    parser.set_defaults(run=demo_cli.run, takes_rest=True)


# --- inspect


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", _inspect, "Say what an adapter or reference file is.")
    parser.add_argument("file", metavar="FILE", help="any file of weights")


def _inspect(args: argparse.Namespace) -> None:
    for name, value in describe_file(Path(args.file)).items():
        print(f"{name + ':':<12} {value}")


# --- convert


def _add_convert(commands: Any) -> None:
    parser = _command(commands, "convert", _convert, "Turn released adapters into our format.")
    parser.add_argument("source", metavar="IN", help="adapter file (released .pt, or our format)")
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--family", help="of a released file: sd15, sd21 (assumed), custom-<width>")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="else that of IN")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _convert(args: argparse.Namespace) -> None:
    source, target = Path(args.source), Path(args.target)
    if target.suffix != ".safetensors":
        raise InputError(f"OUT must end in .safetensors; given {target}.")
    if target.exists() and not args.force:
        raise InputError(f"{target} exists. Give another name, or --force to replace it.")
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {target.parent}. Create it, or give another one.")
    dtypes, metadata = read_header(source)
    adapters = load_adapters(source, family=args.family)
    if FORMAT_KEY in metadata and args.family not in (None, adapters.family):
        raise InputError(
            f"{source} is in our format and says that its family is {adapters.family}; --family {args.family} is for "
            "released files, which carry none."
        )
    dtype = DTYPES[args.dtype or _common_dtype(dtypes)]
    _refuse_overflow(adapters, dtype)
    save_adapters(adapters, target, dtype=dtype)
    print(target)


def _common_dtype(dtypes: Mapping[str, str]) -> str:
    names = set(dtypes.values())
    return names.pop() if len(names) == 1 and names <= set(DTYPES) else "float32"


def _refuse_overflow(adapters: AdapterSet, dtype: torch.dtype) -> None:
    if not all(bool(p.to(dtype).isfinite().all()) for p in adapters.parameters()):
        raise InputError(f"A weight is too large for {dtype}. Use --dtype bfloat16 or float32.")
