"""Frozen dataclasses as configuration: built from plain mappings, unknown keys rejected."""

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, ClassVar, TypeVar

from .errors import InputError

ConfigT = TypeVar("ConfigT", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configurations: a frozen dataclass with defaults, validated by its own ``__post_init__``.

    Attributes:
        elsewhere: What to do instead, by names that other programs have for the same.
        seldom: Fields that ``--help`` leaves out; flags and files may set them all the same.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {}
    seldom: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Build the configuration from a mapping of field names to values.

        Args:
            values: Field name to value; fields left out keep their defaults.

        Returns:
            The configuration.

        Raises:
            InputError: A key names no field; the message gives the nearest field.
        """
        cls.check_keys(values)
        return cls(**values)

    @classmethod
    def check_keys(cls, keys: Iterable[str]) -> None:
        """Refuse keys that are no fields.

        Args:
            keys: Field names to check.

        Raises:
            InputError: Keys name no field; the message gives the nearest field of each.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        wrong = [
            f"There is no setting {key!r}. {cls.elsewhere.get(key) or nearest(key, known, 'Those that there are')}"
            for key in keys
            if key not in known
        ]
        if wrong:
            raise InputError(" ".join(wrong))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary, in the order of declaration."""
        return dataclasses.asdict(self)


def nearest(name: str, known: Iterable[str], heading: str) -> str:
    """Say which of the known names may have been meant, or else list them all.

    Args:
        name: A name that is not known.
        known: The known ones.
        heading: What they are, before a list of them.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"{heading}: {', '.join(names)}."


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Refuse a number that is out of range.

    Args:
        name: What it is called, for the message.
        value: The number.
        low: Least allowed value.
        high: Greatest allowed value; ``None``: any finite one.

    Raises:
        InputError: It is out of range, not finite, or no number.
    """
    if not isinstance(value, Real):
        raise InputError(f"{name} must be a number; given {value!r}.")
    number = value if isinstance(value, int) else float(value)  # numpy compares in its own type
    # comparing holds of NaN, and of whole numbers that are too long for a float
    if not low <= number <= (sys.float_info.max if high is None else high):
        allowed = f"at least {low}" if high is None else f"in {low} ... {high}"
        raise InputError(f"{name} must be {allowed}; given {_short(value)}.")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in which settings something was begun otherwise than it is to go on.

    Args:
        before: What it was begun with.
        now: What is asked for.

    Returns:
        ``steps was 1, is 2; seed was 0, is 3``; empty where ``before`` agrees with all that ``now`` names.
    """
    return "; ".join(
        f"{name} was {_short(before.get(name))}, is {_short(value)}"
        for name, value in now.items()
        if before.get(name) != value
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
