"""The HTML report: nothing of it lies elsewhere, nothing in it is taken for markup."""

import base64
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from colour_profiles import DISPLAY_P3
from PIL import Image

from dreamcache_core.errors import InputError
from dreamcache_core.evaluation.html_report import ImageRow, Table, Thumbnail, write_html_report
from dreamcache_core.images.files import read_image

NASTY = "<script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """Collects the tags and texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)

    @property
    def images(self) -> list[Image.Image]:
        sources = [values["src"] or "" for tag, values in self.tags if tag == "img"]
        return [
            Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
            for source in sources
        ]


def test_the_page_shows_title_notes_tables_and_captions(tmp_path: Path) -> None:
    table = Table("Means", ["subject", "images", "DINO"], [["dog", 4, 0.76549], ["cat", 0, None]])
    row = ImageRow("dog", [Thumbnail(torch.zeros(1, 8, 8, 3), "a dog")])
    path = tmp_path / "report.html"
    write_html_report(path, title="A title", tables=[table], image_rows=[row], notes=["A note"])
    texts = Page(path).texts
    assert texts[:4] == ["A title", texts[1], "A title", "A note"]
    cells = ["Means", "subject", "images", "DINO", "dog", "4", "0.765", "cat", "0", "-"]
    assert texts[4:] == [*cells, "dog", "a dog"]


def test_every_text_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html_report(
        path,
        title=NASTY,
        tables=[Table(NASTY, [NASTY], [[NASTY]])],
        image_rows=[ImageRow(NASTY, [Thumbnail(torch.zeros(1, 8, 8, 3), NASTY)])],
        notes=[NASTY],
    )
    page = Page(path)
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.texts.count(NASTY) == 8
    assert [values["alt"] for tag, values in page.tags if tag == "img"] == [NASTY]


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    row = ImageRow("", [Thumbnail(tmp_path / "red.png"), Thumbnail(torch.ones(1, 9, 9, 3))])
    write_html_report(tmp_path / "report.html", title="", image_rows=[row])
    page = Page(tmp_path / "report.html")
    assert not re.search(r"https?://|url\(|@import", page.source)
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in page.tags}
    linked = [v for _, values in page.tags for k, v in values.items() if k in ("src", "href")]
    assert len(linked) == 2
    assert all((value or "").startswith("data:image/jpeg;base64,") for value in linked)


def test_images_are_shrunk_never_enlarged_and_transparent_parts_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (400, 200), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    row = ImageRow("", [Thumbnail(tmp_path / "clear.png"), Thumbnail(torch.zeros(1, 9, 7, 3))], 50)
    write_html_report(tmp_path / "report.html", title="", image_rows=[row])
    wide, small = Page(tmp_path / "report.html").images
    assert (wide.size, small.size) == ((50, 25), (7, 9))
    assert wide.getpixel((10, 10)) == (255, 255, 255)
    assert small.getpixel((3, 3)) == (0, 0, 0)


def test_icc_profiles_and_deep_greyscale_are_shown_as_they_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), (200, 90, 60)).save(tmp_path / "p3.png", icc_profile=DISPLAY_P3)
    Image.new("I;16", (9, 9), 32768).save(tmp_path / "deep.png")
    paths = [tmp_path / name for name in ("p3.png", "deep.png")]
    write_html_report(
        tmp_path / "report.html", title="", image_rows=[ImageRow("", list(map(Thumbnail, paths)))]
    )
    for shown, path in zip(Page(tmp_path / "report.html").images, paths, strict=True):
        read = (read_image(path)[0][0, 4, 4] * 255).tolist()
        assert shown.getpixel((4, 4)) == pytest.approx(read, abs=4)


def test_a_row_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 cells .* 'Means', got 1"):
        write_html_report(tmp_path / "a.html", title="", tables=[Table("Means", ["a", "b"], [[1]])])


def test_a_failure_leaves_the_older_report(tmp_path: Path) -> None:
    def rows() -> Iterator[ImageRow]:
        yield ImageRow("", [Thumbnail(torch.zeros(1, 8, 8, 3))])
        yield ImageRow("", [Thumbnail(tmp_path / "missing.png")])

    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(InputError, match=r"missing\.png"):
        write_html_report(path, title="", image_rows=rows())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
