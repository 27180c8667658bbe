"""The command line: ``dreamcache demo | generate | inspect | convert | train | dataset | evaluate``."""

from .main import main

__all__ = ["main"]
