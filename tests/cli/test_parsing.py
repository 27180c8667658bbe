"""One parser for flags and TOML files."""

import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from dreamcache_core import InputError
from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.config import Config
from dreamcache_core.errors import MissingPackageError


@dataclass(frozen=True)
class Options(Config):
    """Do something.

    Attributes:
        data: Where the data lies.
    """

    data: str
    steps: int = 5
    rate: float = 0.5
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    is_fast: bool = True
    words: list[str] = field(default_factory=list[str])


def parse(*argv: str) -> Options:
    return parse_config(Options, argv, program="dreamcache something")


def in_file(tmp_path, text: str) -> str:
    (tmp_path / "file.toml").write_text(text, encoding="utf-8")
    return f"--config={tmp_path / 'file.toml'}"


def test_every_field_is_a_flag_with_its_default():
    assert parse("--data", "d") == Options("d")
    flags = ("--steps=7", "--rate", "2e-3", "--name", "n", "--kind=b", "--no-is-fast")
    assert parse("--data=d", *flags, "--words", "x", "y") == Options(
        "d", 7, 2e-3, "n", "b", False, ["x", "y"]
    )


def test_file_gives_values_and_flags_override_them(tmp_path):
    file = in_file(
        tmp_path, 'data = "a b"\nsteps = 3\nis_fast = false\nwords = ["x y", "z"]\nrate = 1\n'
    )
    assert parse(file) == Options("a b", 3, 1.0, None, "a", False, ["x y", "z"])
    assert parse(file, "--steps", "4", "--is_fast").steps == 4
    assert parse(file, "--is_fast").is_fast


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('dat = "d"', "Did you mean 'data'"),
        ("[data]\nx = 1", r"\[data\] is a table"),
        ("data = ", "cannot be read as one"),
        (r'data = "C:\Users\me"', "in 'single quotes'"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        parse(in_file(tmp_path, text), "--data", "d")


def test_missing_file_is_named():
    with pytest.raises(InputError, match=r"absent\.toml"):
        parse("--config", "absent.toml")


@pytest.mark.parametrize("argv", [("--data=d", "--step", "3"), ("--data=d", "--Steps=3")])
def test_misspelt_flags_are_refused_with_the_nearest_field(argv):
    with pytest.raises(InputError, match="Did you mean 'steps'"):
        parse(*argv)


def test_stray_words_are_refused():
    with pytest.raises(InputError, match="stray"):
        parse("--data", "d", "stray")


@pytest.mark.parametrize("wrong", ["--steps=many", "--kind=c", "--rate=fast"])
def test_values_of_the_wrong_type_are_refused_with_the_field(wrong, capsys):
    with pytest.raises(InputError, match=wrong.split("=")[0]):
        parse("--data=d", wrong)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", ["512,512", "many", "3.5"])
def test_a_word_in_the_place_of_a_number_is_named(wrong):
    with pytest.raises(InputError, match=f"^--steps takes one number, given '{wrong}'"):
        parse("--data=d", f"--steps={wrong}")


def test_wrong_types_in_a_file_are_found_by_the_same_parser(tmp_path):
    with pytest.raises(InputError, match="--steps"):
        parse(in_file(tmp_path, 'data = "d"\nsteps = "many"'))


def test_missing_field_is_named():
    with pytest.raises(InputError, match=r"--data STR Where the data lies\."):
        parse()


@pytest.mark.parametrize("flag", ["--is-fast", "--is_fast"])
def test_dashes_and_underscores_are_the_same(flag):
    assert parse("--data=d", flag) == Options("d")
    assert parse("--data=d", flag.replace("--", "--no-")) == Options("d", is_fast=False)
    assert parse("--data=d", f"{flag}=False") == Options("d", is_fast=False)


def test_a_list_takes_several_words_and_its_flag_may_be_repeated(tmp_path):
    flags = ("--words", "a", "b", "--steps=3", "--words=c", "--words", "-1")
    assert parse("--data=d", *flags) == Options("d", 3, words=["a", "b", "c", "-1"])
    file = in_file(tmp_path, 'data = "d"\nwords = ["x"]')
    assert parse(file, *flags).words == ["a", "b", "c", "-1"]


def test_of_other_flags_the_last_counts():
    assert parse("--data=d", "--steps=3", "--steps", "4", "--is-fast", "--no-is-fast") == Options(
        "d", 4, is_fast=False
    )


def test_values_may_look_like_flags_or_none():
    assert parse("--data=--words", "--name=None") == Options("--words", name="None")


@pytest.mark.parametrize("wrong", [("--steps",), ("--config",), ("--no-steps",), ("--name=a", "b")])
def test_one_line_says_what_is_wrong_with_the_flags(wrong, capsys):
    with pytest.raises(InputError, match=r"^\w[^\n\u2500-\u257f]+ See --help\.$"):
        parse("--data=d", *wrong)
    assert capsys.readouterr() == ("", "")


def test_help_tells_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "Do something." in shown
    assert "Where the data lies. (required)" in shown
    assert "(default: 0.5)" in shown
    assert "--config FILE" in shown


def test_missing_tyro_is_said_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(MissingPackageError, match=r"dreamcache\[cli\]"):
        parse("--data=d")


# --- by position


@dataclass(frozen=True)
class Conversion(Config):
    """Convert something."""

    source: str
    target: str
    force: bool = False


def test_fields_without_a_default_are_given_by_position():
    for argv in (["a", "b", "--force"], ["--force", "a", "b"]):
        found = parse_config(Conversion, argv, program="dreamcache x", is_positional=True)
        assert found == Conversion("a", "b", True)
    with pytest.raises(InputError, match="TARGET"):
        parse_config(Conversion, ["a"], program="dreamcache x", is_positional=True)
    with pytest.raises(InputError, match="no setting 'config'"):
        parse_config(Conversion, ["--config=a"], program="dreamcache x", is_positional=True)


def test_entries_of_a_list_in_a_file_become_no_flags(tmp_path):
    text = 'data = "d"\nwords = ["a dog", "--steps=9", "--no-is-fast", "-x", "-5"]'
    assert parse(in_file(tmp_path, text)) == Options(
        "d", words=["a dog", "--steps=9", "--no-is-fast", "-x", "-5"]
    )


@dataclass(frozen=True)
class Filled(Config):
    """Do something.

    Attributes:
        words: There are some.
    """

    words: list[str] = field(default_factory=lambda: ["a", "b"])


def test_empty_list_in_a_file_empties_the_list(tmp_path):
    file = in_file(tmp_path, "words = []")
    assert parse_config(Filled, [file], program="p") == Filled([])
    assert parse_config(Filled, [], program="p") == Filled()


@pytest.mark.parametrize(
    "text",
    [
        *("words = " + "[" * 10_000, "words = [1, \0]", "steps = " + "1" * 5_000),
        "a." * 30_000 + "a = 1",
    ],
    ids=["deep", "NUL", "digits", "parts"],
)
def test_deeply_nested_or_odd_file_is_refused_in_words(tmp_path, text):
    with pytest.raises(InputError, match="Expected --config to be a TOML file"):
        parse("--data=d", in_file(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 0x" + "f" * 6_000, "too many digits"),
        ('words = ["a\\u0000b"]', "character NUL"),
        ('data = "a\\u0000b"', "character NUL"),
    ],
)
def test_values_that_no_flag_could_have_are_refused_in_words(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        parse(in_file(tmp_path, text))
