"""``python -m benchmarks NAME``."""

import argparse
import sys
from collections.abc import Sequence

from dreamcache_core import DreamCacheError

from . import encode, memory, step, training

BENCHMARKS = {"step": step, "encode": encode, "memory": memory, "training": training}
"""Modules with ``add_arguments(parser)`` and ``run(arguments) -> exit status``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark.

    Args:
        argv: Arguments; ``None``: those of the process.

    Returns:
        Exit status: 0 where what is expected holds, 1 where it does not, 2 on bad input.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    arguments = parser.parse_args(argv)
    try:
        return BENCHMARKS[arguments.name].run(arguments)
    except DreamCacheError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
