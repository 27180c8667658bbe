"""``dreamcache demo``."""

from __future__ import annotations

from ..demo.options import DemoOptions
from ..names import printable


def run(options: DemoOptions) -> None:
    """Draw the demo's images, and tell what was made."""
    from ..demo.show import show_demo

    for line in show_demo(options):
        print(printable(line))
