"""Errors that DreamCache raises on purpose; every message says what was expected, what was given and what to do."""

from .names import printable


class DreamCacheError(Exception):
    """Base of all errors that DreamCache raises on purpose; its text is one line, whatever names it repeats."""

    def __str__(self) -> str:
        """Return the message, made printable."""
        return printable(super().__str__())


class FileFormatError(DreamCacheError, ValueError):
    """A file is not what its place asks for: damaged, of another kind, or with wrong contents."""


class MismatchError(DreamCacheError, ValueError):
    """Two things do not belong together: adapters, a reference and a U-Net of different families or layers."""


class InputError(DreamCacheError, ValueError):
    """A value is out of range or of the wrong kind."""


class UnsupportedModelError(DreamCacheError, TypeError):
    """The model is not a U-Net whose layers DreamCache can read."""


class StateError(DreamCacheError, RuntimeError):
    """Calls came in the wrong order."""


class MissingPackageError(DreamCacheError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""
