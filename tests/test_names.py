"""Texts and names of strangers: what of them is shown, and what may name a file."""

import pytest

from dreamcache_core.errors import DreamCacheError, FileFormatError
from dreamcache_core.names import is_plain_name, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a dog,  \u00e9\u3000\u72ac \U0001f415\u200d\U0001f9ba", None),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nerror: b\r", r"a\nerror: b\r"),
        ("\x9b\x7f\0", r"\x9b\x7f\x00"),
        ("gpj\u202e.exe", r"gpj\u202e.exe"),
        ("a\u2028b", r"a\u2028b"),
        ("\udcff\ud800", r"\udcff\ud800"),
    ],
)
def test_control_characters_and_line_breaks_are_escaped(text: str, shown: str | None):
    assert printable(text) == (text if shown is None else shown)
    assert printable(printable(text)) == printable(text)


def test_every_error_is_one_printable_line():
    error = FileFormatError("no layer a\nwarning: all is well\x1b[2J")
    assert isinstance(error, DreamCacheError)
    assert str(error) == r"no layer a\nwarning: all is well\x1b[2J"


@pytest.mark.parametrize("name", ["backpack", "cat2", "a dog.png", "\u72ac", "a.b"])
def test_plain_names_pass(name: str):
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "../x",
        "a/b",
        "/etc",
        "a\\b",
        "C:",
        "a\n",
        "a ",
        "a.",
        "*",
        "\0",
        "x" * 201,
    ],
)
def test_names_that_lead_elsewhere_do_not_pass(name: str):
    assert not is_plain_name(name)
