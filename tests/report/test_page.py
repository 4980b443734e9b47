import json
from html.parser import HTMLParser

import pytest

from gatewright.report import write_pictures, write_report

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the texts and pictures."""

    def __init__(self, text):
        super().__init__()
        self.open_tags, self.texts, self.pictures, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_without_pictures(run_folder):
    path = write_report(run_folder)
    page = Page(path.read_text())
    assert path == run_folder / "report.html"
    assert page.pictures == []
    assert not page.tags & {"b", "script", "cpu"}
    for text in ("digits <script>, seed 3", "97.50%", "<b>dog</b>", "dead", "Layer net/moe & co", "Some <CPU>"):
        assert text in page.texts
    assert "cat 100%, <b>dog</b> 50%, [red]fox 50%" in page.texts


def test_the_page_holds_its_pictures(run_folder):
    pytest.importorskip("matplotlib")
    write_pictures(run_folder)
    page = Page(write_report(run_folder).read_text())
    assert len(page.pictures) == 4
    assert all(picture["src"].startswith("data:image/png;base64,iVBORw0KGgo") for picture in page.pictures)
    assert all(
        200 < int(picture["style"].removeprefix("width: ").removesuffix("px")) < 1000 for picture in page.pictures
    )
    assert all(picture["alt"] for picture in page.pictures)


def test_a_dense_run_on_named_hardware(run_folder, result):
    result |= {"layers": {}, "hardware": "a big <machine>"}
    (run_folder / "result.json").write_text(json.dumps(result))
    page = Page(write_report(run_folder).read_text())
    assert "a big <machine>" in page.texts
