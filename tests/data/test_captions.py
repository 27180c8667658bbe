"""Captions: files of every form, and the lists that ship."""

from pathlib import Path

import pytest

from dreamcache_core.data.synthetic.captions import (
    CONTEXTS_FILE,
    SUBJECTS_FILE,
    Caption,
    captions_digest,
    combine_lists,
    read_captions,
)
from dreamcache_core.errors import InputError


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: str | bytes, name: str = "captions.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def test_lines_with_and_without_subject(write) -> None:
    path = write("a red cup\tthe red cup on a shelf\r\n\n  a dog, in the snow  \na bird\n")
    assert read_captions(path) == [
        Caption("a red cup", "the red cup on a shelf"),
        Caption("a dog", "a dog, in the snow"),
        Caption("a bird", "a bird"),
    ]


def test_a_byte_order_mark_and_other_alphabets_are_read(write) -> None:
    path = write(b"\xef\xbb\xbfa cat\xc3\xa9\n")
    assert read_captions(path) == [Caption("a cat\u00e9", "a cat\u00e9")]


@pytest.mark.parametrize("line", ["a\tb\tc", "\tcaption", "subject\t", "subject\t \t"])
def test_a_line_with_stray_tabs_is_refused_by_number(write, line) -> None:
    path = write(f"fine\n{line}\n")
    with pytest.raises(InputError, match="in line 2 of"):
        read_captions(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "empty"), (" \n\n\t\n", "empty"), (b"\xff\xfea\x00", "UTF-8")],
)
def test_files_without_text_are_refused(write, content, message) -> None:
    with pytest.raises(InputError, match=message):
        read_captions(write(content))


def test_a_missing_file_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"none\.txt"):
        read_captions(tmp_path / "none.txt")


def test_every_subject_meets_every_context_once_in_a_seeded_order(write) -> None:
    lists = write("a cat\na dog\n", "s.txt"), write("at sea\nat home\nin bed\n", "c.txt")
    first, again, other = (combine_lists(*lists, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first, key=repr) == sorted(other, key=repr)
    assert len(set(first)) == 6
    assert Caption("a dog", "a dog, in bed") in first


def test_the_lists_that_ship_are_long_plain_and_without_repetition() -> None:
    for file, at_least in ((SUBJECTS_FILE, 300), (CONTEXTS_FILE, 120)):
        lines = file.read_text(encoding="ascii").splitlines()
        assert len(lines) == len({line.lower() for line in lines}) >= at_least
        assert all(line == " ".join(line.split()) and len(line) < 60 for line in lines)
    captions = combine_lists()
    slugs = {caption.subject: caption.slug for caption in captions}
    assert len(set(slugs.values())) == len(slugs)  # each its own folder


@pytest.mark.parametrize(
    ("subject", "slug"),
    [
        ("A Red  Cup!", "a-red-cup"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "subject"),
        ("caf\u00e9_noir", "caf\u00e9-noir"),
        ("cafe\u0301", "caf\u00e9"),
        ("x" * 80, "x" * 50),
    ],
)
def test_the_folder_of_a_subject_is_a_plain_name(subject, slug) -> None:
    assert Caption(subject, "text").slug == slug


def test_the_digest_tells_captions_and_their_order() -> None:
    one, two = Caption("a", "b"), Caption("a", "c")
    digests = [captions_digest(c) for c in ([one, two], [two, one], [one], [Caption("a\tb", "")])]
    assert len(set(digests)) == 4
