"""The program: which command is meant, what it exits with, and what it says on stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from ..config import nearest
from ..errors import DreamCacheError, InputError
from ..names import printable
from ..version import __version__
from .commands import PROGRAM, Group, show_commands
from .parsing import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``None`` takes those of the process.

    Returns:
        Exit code: 0 done, 2 bad input (one line on stderr says what), 130 interrupted, 141 nobody reads the output any more.

    Raises:
        SystemExit: Help was asked for (code 0), or ``dataset check`` found problems (1).
    """
    return guarded(_run, sys.argv[1:] if argv is None else argv)


def _run(argv: Sequence[str]) -> None:
    name, chosen, rest = "dreamcache", PROGRAM, list(argv)
    if rest == ["--version"]:
        print(f"{name} {__version__}")
        return
    while isinstance(chosen, Group):
        if not rest or rest[0].startswith("-"):
            show_commands(chosen, rest, program=name)
            return
        word, *rest = rest
        if word not in chosen.commands:
            hint = nearest(word, chosen.commands, "Commands")
            raise InputError(f"There is no command {f'{name} {word}'!r}. {hint}")
        name, chosen = f"{name} {word}", chosen.commands[word]
    if chosen.first and rest and not rest[0].startswith("-"):
        rest[0] = f"--{chosen.first}={rest[0]}"
    chosen.run(parse_config(chosen.options, rest, program=name, is_positional=chosen.is_positional))


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
        except BrokenPipeError:  # whoever read the output, "head" say, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (DreamCacheError, OSError) as error:
            return _fail(str(error))
        except UnicodeEncodeError as error:
            return _fail(
                f"A name or text is no Unicode: {error}. Rename the file, or mend the text."
            )
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
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


class _StderrHandler(logging.Handler):
    """Shows each message of the package once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        line = f"{kind}: {printable(record.getMessage())}"
        if line not in self.seen:
            self.seen.add(line)
            tqdm.write(line, file=sys.stderr)  # on a line of its own beside a progress bar


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
