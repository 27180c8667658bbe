"""A configuration from the command line: every field is a flag, and a TOML file may hold any of them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..config import Config, ConfigT
from ..errors import InputError
from ..packages import require


def parse_config(kind: type[ConfigT], argv: Sequence[str], *, program: str) -> ConfigT:
    """Build a configuration from flags; ``--config FILE`` names a TOML file that the flags override.

    Ends the process, as ``argparse`` does, after ``--help`` and on a value of the wrong type.

    Args:
        kind: The configuration; ``help`` in its fields' metadata explains the flags, its docstring the command.
        argv: Arguments without program and command.
        program: Program and command, for the help text.

    Returns:
        The configuration.

    Raises:
        InputError: The file is missing or no TOML, or a key or a flag is no field; the message names the nearest.
        MissingPackageError: transformers, whose argument parser reads the fields, is not installed.
    """
    with require("transformers", "train"):
        from transformers import HfArgumentParser
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar="FILE")
    given, flags = first.parse_known_args(list(argv))
    parser: Any = HfArgumentParser(
        cast(Any, kind), prog=program, description=kind.__doc__, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these fields")
    in_file = {} if given.config is None else read_toml(given.config)
    kind.check_keys(in_file)
    values, unknown = parser.parse_known_args([*_as_flags(in_file), *flags])
    _refuse_unknown(kind, unknown)
    return kind.from_dict({k: v for k, v in vars(values).items() if k != "config"})


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.

    Returns:
        Its keys and values.

    Raises:
        InputError: It is missing or no TOML.
    """
    try:
        import tomllib
    except ImportError as error:
        raise InputError(
            "--config needs Python 3.11 or newer. Give the fields as flags."
        ) from error
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"Expected --config to be a TOML file; {path} cannot be read as one: {error}. Write a line such as "
            'steps = 1000 for each field, texts in "quotes".'
        ) from error


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    """Write a file's values as flags, so that one parser checks them all."""
    flags: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            raise InputError(f"Expected plain fields in the file; [{key}] is a table. Remove it.")
        if isinstance(value, list):
            flags += [f"--{key}", *(str(entry) for entry in value)] if value else []
        else:
            flags.append(f"--{key}={value}")
    return flags


def _refuse_unknown(kind: type[Config], unknown: Sequence[str]) -> None:
    if not unknown:
        return
    names = [flag[2:].split("=")[0].replace("-", "_") for flag in unknown if flag.startswith("--")]
    kind.check_keys(names)
    raise InputError(f"Unexpected arguments: {' '.join(unknown)}. See --help.")
