"""``python -m research.evidence``: measure the demo model on held-out subjects."""

import shlex
import sys
from pathlib import Path

from dreamcache_core.cli.main import guarded
from dreamcache_core.cli.parsing import parse_config

from .pages import write_page, write_report
from .run import DemoEvaluationOptions, gather_evidence, image_folders
from .tables import summary_lines

PROGRAM = "python -m research.evidence"


def measure(argv: list[str]) -> None:
    """Measure, and write pages and report.

    Args:
        argv: Flags, see ``--help``.
    """
    options = parse_config(DemoEvaluationOptions, argv, program=PROGRAM)
    evidence = gather_evidence(options, f"{PROGRAM} {shlex.join(argv)}".rstrip())
    print("\n".join(summary_lines(evidence)))
    out = Path(options.out)
    written = write_page(evidence, out)
    report = write_report(evidence, options.triples(), image_folders(options), out)
    for path in (*written, report):
        print(path)


def main(argv: list[str]) -> int:
    """Run the command; see ``dreamcache_core.cli.main`` for the exit codes.

    Args:
        argv: Flags, see ``--help``.
    """
    return guarded(measure, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
