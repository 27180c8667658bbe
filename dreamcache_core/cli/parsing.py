"""A configuration from the command line: every field is a flag, and a TOML file may hold any of them."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated, Any, cast, get_origin, get_type_hints

from ..config import Config, ConfigT
from ..errors import FileFormatError, InputError
from ..files.texts import read_text
from ..packages import require

NOT_NUMBERS = (
    r"Error parsing (--\S+): no type matching INT could be instantiated from \[(.*)\]",
    r"Error parsing (--\S+): could not convert string to float: (.*)",
    r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.*)",
)
"""What tyro says of a word in the place of a number."""

NO_FLAG = "\x1a"
"""Put before an entry of a file's list that begins like a flag."""


def parse_config(
    kind: type[ConfigT], argv: Sequence[str], *, program: str, is_positional: bool = False
) -> ConfigT:
    """Build a configuration from flags; ``--config FILE`` names a TOML file that the flags override.

    Dashes and underscores are the same in a flag. A list takes several words after its flag, which may be repeated.

    Args:
        kind: The configuration; its docstring explains the command, and its ``Attributes`` the flags.
        argv: Arguments without program and command.
        program: Program and command, for the help text.
        is_positional: Fields without a default have no flag, but a position, and there is no ``--config FILE``.

    Returns:
        The configuration.

    Raises:
        InputError: A flag or a key of the file is no field (the message names the nearest), a value is of the wrong
            type or missing, or the file is missing or no TOML.
        MissingPackageError: tyro is not installed.
        SystemExit: Help was asked for (code 0).
    """
    tyro = require_tyro()
    form = _make_form(kind, is_positional)
    given = _split(argv)
    names = [name.removeprefix("no_") for name, _ in given]
    form.check_keys(name for name in names if name not in ("", "help"))
    files = [value for name, words in given if name == "config" for value in _values(words)]
    if files and "config" not in _names(kind):
        values = read_toml(files[-1])
        kind.check_keys(values)
        given = [part for part in _as_flags(values) if part[0] not in names] + given
    is_help = any(word in ("-h", "--help") for word in argv)
    with errors_as_exceptions():
        parsed = tyro.cli(
            annotated_form(kind, is_positional, is_help=is_help),
            prog=program,
            args=_as_argv(kind, given),
        )
    return kind.from_dict({name: _unmarked(getattr(parsed, name)) for name in _names(kind)})


def _unmarked(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return type(value)(e.removeprefix(NO_FLAG) if isinstance(e, str) else e for e in value)


def require_tyro() -> Any:
    """Import tyro.

    Returns:
        The module.

    Raises:
        MissingPackageError: It is not installed.
    """
    with require("tyro", "cli"):
        import tyro
    return tyro


def annotated_form(
    kind: type[Config], is_positional: bool, *markers: Any, is_help: bool = False
) -> Any:
    """Return what tyro is given for a configuration.

    Args:
        kind: The configuration.
        is_positional: As in ``parse_config``.
        *markers: Further ones of ``tyro.conf``.
        is_help: Without what ``kind.seldom`` names, which tyro cannot hide and yet read.
    """
    conf = require_tyro().conf
    markers += (conf.DisallowNone,)
    if is_positional:
        markers += (conf.PositionalRequiredArgs, conf.PositionalMetavarFromFieldName)
    return Annotated[(_make_form(kind, is_positional, is_help), *markers)]  # pyright: ignore[reportInvalidTypeForm]


@cache
def _make_form(kind: type[Config], is_positional: bool, is_help: bool = False) -> type[Config]:
    """Derive a class with the same fields and ``config``, whose values are not checked yet."""
    conf = require_tyro().conf
    file = Annotated[
        str | None, conf.arg(metavar="FILE", help="TOML file with any of these options.")
    ]
    has_file = not is_positional and "config" not in _names(kind)
    left_out = [f for f in dataclasses.fields(kind) if is_help and f.name in kind.seldom]
    form = dataclasses.make_dataclass(
        kind.__name__,
        [
            *([("config", file, None)] if has_file else []),
            *((f.name, conf.Suppress[Any], f) for f in left_out),
        ],
        bases=(kind,),
        namespace={"__post_init__": lambda _: None, "__doc__": kind.__doc__},
        frozen=True,
    )
    return cast(type[Config], form)


def _names(kind: type[Config]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _split(argv: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Split at the flags -> their names, each with its words from the flag on; words before any flag have none."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for word in argv:
        if re.match("--[A-Za-z]", word):
            parts.append((word[2:].partition("=")[0].replace("-", "_"), []))
        parts[-1][1].append(word)
    return parts


def _values(words: Sequence[str]) -> list[str]:
    """Return what is given to a flag, by ``=`` or after it."""
    _, equals, value = words[0].partition("=")
    return [value, *words[1:]] if equals else [*words[1:]]


def _as_argv(kind: type[Config], parts: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Write flags as tyro reads them: the flag of a list once, that of a truth value without ``=true``."""
    types = get_type_hints(kind)
    switches = {"true": "--", "false": "--no_"}
    argv: list[str] = []
    lists: dict[str, list[str]] = {}
    for name, words in parts:
        if get_origin(types.get(name)) in (list, Sequence):
            lists.setdefault(name, [f"--{name}"]).extend(_values(words))
        elif types.get(name) is bool and (value := " ".join(_values(words)).lower()) in switches:
            argv.append(switches[value] + name)
        else:
            argv += words
    return [*argv, *chain.from_iterable(lists.values())]


MAX_TOML_BYTES = 2**14
"""Largest file of settings; names of many parts take the square of their length in time."""


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
    text = ""
    try:
        text = read_text(path, MAX_TOML_BYTES)
        return tomllib.loads(text)
    except (FileFormatError, ValueError, RecursionError) as error:
        windows = " Write paths with backslashes in 'single quotes'." if "\\" in text else ""
        raise InputError(
            f"Expected --config to be a TOML file; {path} cannot be read as one: {error}. Write a line such as "
            f'steps = 1000 for each field, texts in "quotes".{windows}'
        ) from error


def _as_flags(values: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Write a file's values as flags, so that one parser checks them all."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            raise InputError(f"Expected plain fields in the file; [{key}] is a table. Remove it.")
        if isinstance(value, list):
            entries = (_text(key, entry) for entry in cast(list[Any], value))
            yield key, [f"--{key}", *(e if e[:1] != "-" else NO_FLAG + e for e in entries)]
        else:
            yield key, [f"--{key}={_text(key, value)}"]


def _text(key: str, value: object) -> str:
    """Write a value as a word of the command line, which could not hold all that TOML can."""
    try:
        text = str(value)
    except ValueError as error:
        raise InputError(f"{key} is a number of too many digits. Set a smaller one.") from error
    if "\0" in text:
        raise InputError(f"{key} holds the character NUL. Remove it.")
    return text


@contextmanager
def errors_as_exceptions() -> Iterator[None]:
    """Raise what tyro would print in a box on stderr: the first paragraph after its heading."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    except SystemExit as error:
        if not error.code:
            raise
        text = re.sub("[\u2500-\u257f]+", " ", printed.getvalue())  # what boxes are drawn with
        lines = [line.strip() for line in text.splitlines()][1:]
        paragraphs = groupby(lines, key=lambda line: bool(line.strip("-")))
        message = next(" ".join(part) for is_text, part in paragraphs if is_text)
        for words in NOT_NUMBERS:
            message = re.sub(words, r"\1 takes one number, given \2", message)
        raise InputError(f"{message.rstrip(' .')}. See --help.") from None
