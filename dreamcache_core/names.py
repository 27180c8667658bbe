"""Texts and names that come from files of others: what may be shown, and what may name a file."""

import re

_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, marks that turn the direction of writing, and halves of characters."""

_PLAIN = re.compile(r'[^\\/:*?"<>|]{1,200}')


def printable(text: str) -> str:
    """Escape what could forge a line or command a terminal: control characters, line breaks, lone surrogates."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def is_plain_name(name: str) -> bool:
    """Whether a name is that of one file or folder on every system, and leads nowhere else."""
    is_shown = name == printable(name) and name == name.strip(" .")
    return is_shown and _PLAIN.fullmatch(name) is not None
