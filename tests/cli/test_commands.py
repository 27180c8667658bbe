"""All commands: their flags are the fields of their options, their help is the docstrings, their errors are one line."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docstring_parser
import pytest
import torch
from PIL import Image

from dreamcache_core import __version__
from dreamcache_core.cli import generate
from dreamcache_core.cli.commands import PROGRAM, Command, Group
from dreamcache_core.cli.main import main
from dreamcache_core.cli.parsing import parse_config
from dreamcache_core.evaluation.dreambench.options import DreamBenchOptions
from dreamcache_core.pipeline.generate import GenerateOptions
from dreamcache_core.training.config import TrainConfig

ROOT = Path(__file__).parents[2]


def walk(group: Group, name: str = "") -> Iterator[tuple[str, Command]]:
    for word, entry in group.commands.items():
        if isinstance(entry, Group):
            yield from walk(entry, f"{name}{word} ")
        else:
            yield f"{name}{word}", entry


COMMANDS = dict(walk(PROGRAM))
NEEDED = {
    "train": ["--data=d"],
    "evaluate dreambench": ["--images=i"],
    "generate": [],
    "dataset check": ["--path=p", "--out=x.png"],
}
"""What a command wants besides its fields without a default."""

each_command = pytest.mark.parametrize("name", COMMANDS)


def required(name: str) -> list[str]:
    command = COMMANDS[name]
    fields = [f for f in dataclasses.fields(command.options) if not has_default(f)]
    if command.is_positional:
        return [*(f.name for f in fields), *NEEDED.get(name, [])]
    return [*(f"--{f.name}={f.name}" for f in fields), *NEEDED.get(name, [])]


def has_default(field: dataclasses.Field[object]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def parse(name: str, *more: str) -> object:
    command = COMMANDS[name]
    argv = [*required(name), *more]
    return parse_config(command.options, argv, program=name, is_positional=command.is_positional)


def help_of(name: str, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def plain(text: str) -> str:
    """Text without box, line breaks and case."""
    return " ".join(re.sub("[\u2500-\u257f]", " ", text).split()).lower()


@each_command
def test_help_tells_every_field_with_its_docstring_and_default(name, capsys, monkeypatch):
    options = COMMANDS[name].options
    shown = help_of(name, capsys, monkeypatch)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    documented = {p.arg_name: p.description for p in docstring_parser.parse(options.__doc__).params}
    assert list(documented) == [f.name for f in dataclasses.fields(options)]
    for field in dataclasses.fields(options):
        text = plain(documented[field.name])
        if field.name in options.seldom:
            assert f"--{field.name.replace('_', '-')}" not in shown
            continue
        if not has_default(field):
            text += " (required)"
        elif isinstance(field.default, bool | int | float | None):
            text += f" (default: {field.default})".lower()
        assert text in plain(shown)
        assert f"--{field.name.replace('_', '-')}" in shown or COMMANDS[name].is_positional


@pytest.mark.parametrize("name", ["", "dataset", "evaluate"])
def test_help_of_a_group_lists_its_commands(name, capsys, monkeypatch):
    shown = help_of(name, capsys, monkeypatch)
    _, *lines = shown.splitlines()  # tyro does not break the list of commands
    assert max(map(len, lines)) <= 80
    for command in COMMANDS:
        group, _, word = command.rpartition(" ")
        if group == name:
            first, *_ = inspect.getdoc(COMMANDS[command].options).splitlines()
            assert f"{word} {first}".lower() in plain(shown)


@each_command
def test_dashes_and_underscores_are_the_same_in_every_flag(name):
    plain_options = parse(name)
    for field in dataclasses.fields(plain_options):
        if "_" in field.name and isinstance(field.default, bool):
            for flag in (field.name, field.name.replace("_", "-")):
                prefix = "--no-" if field.default else "--"
                assert getattr(parse(name, prefix + flag), field.name) is not field.default
        elif "_" in field.name and isinstance(field.default, int | float):
            value = str(field.default)
            for flag in (field.name, field.name.replace("_", "-")):
                assert parse(name, f"--{flag}={value}") == plain_options
                assert parse(name, f"--{flag}", value) == plain_options


@each_command
def test_a_misspelt_flag_is_one_line_that_names_the_nearest(name, capsys):
    *_, field = (f for f in dataclasses.fields(COMMANDS[name].options) if len(f.name) > 3)
    assert main([*name.split(), f"--{field.name[:-1]}x", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert f"Did you mean {field.name!r}?" in printed.err


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if not c.is_positional])
def test_a_misspelt_key_is_one_line_that_names_the_nearest(name, capsys, tmp_path):
    # --config is of another model or command there
    if name in ("generate", "fit", "dataset check"):
        return
    *_, field = dataclasses.fields(COMMANDS[name].options)
    (tmp_path / "file.toml").write_text(f"{field.name}x = 1\n")
    assert main([*name.split(), "--config", str(tmp_path / "file.toml")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"Did you mean {field.name!r}?" in printed


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "Expected one of {demo, generate, inspect, convert, fit, train, dataset, evaluate}"),
        (["dataset"], "Expected one of {build, check, encode, masks, shard}"),
        (["trian"], "Did you mean 'train'?"),
        (["dataset", "biuld"], "Did you mean 'build'?"),
        (["walk"], "Commands: demo, generate, inspect"),
        (["--prompt"], "--prompt"),
        (["train"], "--model STR"),
        (["demo", "--steps=many"], "--steps"),
        (["inspect"], "FILE"),
        (["inspect", "a", "b"], "Unrecognized options: b"),
        (["convert", "a", "b", "--dtype=float8"], "--dtype"),
        (["generate", "--image-range", "0"], "--image-range"),
    ],
)
def test_other_wrong_arguments_are_one_line_and_code_2(argv, said, capsys):
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_generate_takes_its_lists_and_ranges_as_words_or_repeated_flags():
    flags = ["--reference=b", "--mask", "c", "d", "--image-range", "0", "0.75"]
    found = parse("generate", *flags)
    assert isinstance(found, GenerateOptions)
    assert list(found.reference) == ["reference", "b"]
    assert list(found.mask) == ["c", "d"]
    assert found.image_range == (0.0, 0.75)


def test_generate_without_an_image_is_refused(capsys):
    flags = [flag for flag in required("generate") if not flag.startswith("--reference")]
    assert main(["generate", "--reference", *flags]) == 2
    assert "image after --reference" in capsys.readouterr().err


def test_what_help_leaves_out_is_read_all_the_same(capsys, monkeypatch):
    assert "--steps" in (shown := help_of("train", capsys, monkeypatch))
    assert "docs/training.md" in shown
    assert TrainConfig.seldom <= {f.name for f in dataclasses.fields(TrainConfig)}
    found = parse("train", "--timestep=5", "--layers=a")
    assert isinstance(found, TrainConfig)
    assert (found.timestep, list(found.layers)) == (5, ["a"])


def test_defaults_of_generate_stand_once():
    source = inspect.getsource(DreamBenchOptions)
    # the benchmark keeps the paper's image guidance
    names = {f.name for f in dataclasses.fields(GenerateOptions) if has_default(f)}
    for name in names - {"image_guidance"}:
        for value in re.findall(rf"^    {name}: .+ = (.+)$", source, re.MULTILINE):
            assert value == f"GenerateOptions.{name}"


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dreamcache {__version__}\n"


def test_shell_completion_knows_commands_and_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--tyro-print-completion", "bash"])
    assert not ended.value.code
    script = capsys.readouterr().out
    assert "dreambench" in script
    assert "--image-guidance" in script


def test_help_loads_no_model_library():
    code = (
        "import sys\nfrom dreamcache_core.cli import main\n"
        "try:\n    main(['train', '--help'])\nfinally:\n    print('modules', *sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "--lr-schedule" in done.stdout
    heavy = {"accelerate", "datasets", "diffusers", "transformers", "matplotlib", "webdataset"}
    assert not heavy & set(done.stdout.partition("\nmodules ")[2].split())


def test_two_runs_into_one_folder_at_the_same_time_overwrite_nothing(tmp_path: Path):
    image = torch.zeros(1, 8, 8, 3)
    runs = [generate._Files(tmp_path, {"prompt": "a"}, [image]) for _ in range(2)]
    for seed, files in enumerate(runs):
        files.add_image(image, seed)
    for files in runs:
        files.finish()
    names = [
        f"{n:04d}_{name}.png" for n in (1, 2) for name in ("reference", f"seed_{n - 1}", "sheet")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such file names")
def test_a_folders_name_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "a\x1b[31m"
    folder.mkdir()
    generate._Files(folder, {}, []).write("x", torch.zeros(1, 8, 8, 3), {})
    assert r"a\x1b[31m/0000_x.png" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such file names")
def test_file_name_that_is_no_unicode_is_shown_and_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / os.fsdecode(b"caf\xe9\x1b")
    folder.mkdir()
    Image.new("RGB", (80, 64), "red").save(folder / "a.png")
    (folder / "set.csv").write_text("image,caption\na.png,red\n")
    out = ("--out", str(folder / "check.png"))
    assert main(["dataset", "check", str(folder / "set.csv"), "--resolution", "64", *out]) == 0
    assert main(["inspect", str(folder / "missing.pt")]) == 2
    printed = capsys.readouterr()
    assert r"caf\udce9\x1b/check.png" in printed.out
    assert r"caf\udce9\x1b/missing.pt" in printed.err
