"""Packages that not everybody has installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingPackageError


@contextmanager
def require(package: str, extra: str) -> Iterator[None]:
    """Say which extra brings a package, where importing it inside the context fails.

    Args:
        package: Name of the package, for the message.
        extra: Extra of this project that installs it.

    Raises:
        MissingPackageError: The import failed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(
            f"This needs {package} ({error}). Install it: pip install 'dreamcache[{extra}]'."
        ) from error
