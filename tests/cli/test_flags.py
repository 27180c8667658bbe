"""One parser for flags and TOML files."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from dreamcache_core import InputError
from dreamcache_core.cli.flags import parse_config
from dreamcache_core.config import Config


@dataclass(frozen=True)
class Options(Config):
    """Do something."""

    data: str = field(metadata={"help": "where the data lies"})
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
def test_values_of_the_wrong_type_end_with_the_field_in_the_message(wrong, capsys):
    with pytest.raises(SystemExit):
        parse("--data=d", wrong)
    assert wrong.split("=")[0] in capsys.readouterr().err


def test_wrong_types_in_a_file_are_found_by_the_same_parser(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(in_file(tmp_path, 'data = "d"\nsteps = "many"'))
    assert "--steps" in capsys.readouterr().err


def test_missing_field_is_named(capsys):
    with pytest.raises(SystemExit):
        parse()
    assert "--data" in capsys.readouterr().err
