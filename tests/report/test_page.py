import json
import re
from html.parser import HTMLParser

import pytest

from gatewright.report import write_report
from tests.report.conftest import CLASSES

pytest.importorskip("matplotlib")

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the texts and the drawings."""

    def __init__(self, text):
        super().__init__()
        self.source, self.open_tags, self.texts, self.tags, self.drawings = text, [], [], set(), []
        self.feed(text)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "svg":
            self.drawings.append(dict(attrs))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags[-1:] not in (["style"], ["script"]):
            self.texts.append(data.replace("\N{NO-BREAK SPACE}", " "))


def test_the_page_says_what_it_shows_in_one_file_for_light_and_dark_and_for_phones(run_folder):
    path = write_report(run_folder)
    page = Page(path.read_text())
    assert path == run_folder / "report.html"
    assert not page.tags & {"b", "script", "cpu", "img", "link"}
    for text in (
        "digits <script>, seed 3",
        "97.50%",
        "of 200 test images are classified right",
        "pets (/data/pets): 1,000 training, 200 test images",
        "optim.lr 0.1 (recipe: 0.001)",
        "optim.lr was 0.2 until step <5>, and is 0.1 from there on.",
        "1 epoch in 1 min 15 s",
        "gatewright train digits --optim.lr 0.1",
        "2026-01-02 03:04 UTC",
        "net/moe & co",
        "Router NoisyTopK: 1 of 3 experts for each image.",
        "On the test set",
        "In training",
        "class 7",
        "Some <CPU>",
    ):
        assert text in page.texts
    said = [text for text in page.texts if text.strip()]
    first = said.index("digits <script>, seed 3", 1)  # behind the title
    assert said[first + 1 : first + 4] == [
        "3 experts, 1 dead, busiest 2.2 times the mean, nothing dropped on the test set",
        "Expert 0 of net/moe & co is busy: it gets 2.2 times the mean load.",
        "Expert 1 of net/moe & co is dead: no test image reaches it.",
    ]
    assert "cat 100%, <b>dog</b> 50%, [red]fox 50%" in page.texts
    assert len(page.drawings) == 3  # loss, learning rate, load
    assert all(drawing["aria-label"] for drawing in page.drawings)
    assert re.search(r"https?:|url\((?!#)|@import|src=", page.source) is None
    assert "prefers-color-scheme: dark" in page.source
    assert "width=device-width" in page.source
    colours = {name for name in re.findall(r"var\((--[\w-]+)\)", page.source) if name != "--share"}
    assert all(f"{name}:" in page.source for name in colours)


def test_dead_experts_are_told_apart_by_the_images_that_did_not_reach_them(run_folder):
    """Expert 1 got no test image, and none in training either: that was not logged as dead, then it is."""
    page = Page(write_report(run_folder).read_text())
    assert "dead: no test image" in page.texts
    assert any(text.startswith("At the last logged step every expert got something.") for text in page.texts)
    dead = {"step": 180, "time": 0.0, "values": {"train/layers/net/moe & co/dead_experts": 1}}
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(dead) + "\n")
    page = Page(write_report(run_folder).read_text())
    assert any(text.startswith("At the last logged step 1 expert of 3 got nothing.") for text in page.texts)


def test_each_expert_has_its_images_and_what_is_known_of_it(run_folder, result):
    picture = "data:image/png;base64,AAAA"
    example = {"image": picture, "class": "<b>dog</b>", "taken_for": "7", "weight": 0.914}
    own = {"own": 1200, "accuracy": 0.875, "confuses": [["cat", "7", 3]], "examples": [example], "without": 0.5}
    none = {"own": 0, "accuracy": None, "confuses": [], "examples": [], "without": None}
    profiles = {"of": 2000, "confidence": 0.66, "profiles": [own, none, none]}
    result["layers"]["net/moe & co"] |= profiles | {"alike": [[1.0, -0.2, 0.3], [-0.2, 1.0, 0.0], [0.3, 0.0, 1.0]]}
    (run_folder / "result.json").write_text(json.dumps(result))
    source = write_report(run_folder).read_text()
    said = [text for text in Page(source).texts if text.strip()]
    place = said.index("what it confuses")
    assert said[place + 1 : place + 6] == ["0", "1,200", "87.5%", "50.0%", "cat for 7 (3)"]
    assert said[place + 6 : place + 10] == ["1", "0", "–", "–"]
    assert 'title="&lt;b&gt;dog&lt;/b&gt;, taken for 7: weight 91 %" class="wrong"' in source
    assert re.findall(r'src="([^"]*)"', source) == [picture]
    assert '<td style="--share: 0%">-20</td>' in source
    assert '<td style="--share: 30%">30</td>' in source


def test_one_of_several_layers_is_chosen_by_a_script_without_which_all_are_there(run_folder, result):
    layer = result["layers"]["net/moe & co"]
    result["layers"] |= {"second": layer}
    (run_folder / "result.json").write_text(json.dumps(result))
    page = Page(write_report(run_folder).read_text())
    assert "hidden" not in re.findall(r'<section class="layer"([^>]*)>', page.source)
    assert page.source.count('<section class="layer">') == 2
    assert '<label class="chooser" hidden>' in page.source  # until the script shows it
    said = [text for text in page.texts if text.strip()]
    place = said.index("Layer ")
    assert said[place + 1 : place + 4] == ["net/moe & co", "second", "all 2 layers"]


def test_of_many_classes_the_mistakes_are_listed(run_folder, result):
    names = [f"kind {index}" for index in range(40)]
    confusion = [[5 * (row == column) for column in range(40)] for row in range(40)]
    confusion[3][8] = 4
    result |= {"layers": {}, "confusion": confusion, "test_accuracy_per_class": dict.fromkeys(names, 0.9)}
    (run_folder / "result.json").write_text(json.dumps(result))
    page = Page(write_report(run_folder).read_text())
    place = page.texts.index("The most frequent mistakes")
    assert [text for text in page.texts[place:] if text.strip()][4:7] == ["4", "kind 3", "kind 8"]


def test_cells_say_their_share_unless_they_are_many(run_folder, result):
    layer = result["layers"]["net/moe & co"]
    for num_experts, cell in ((2, '<td style="--share: 50%">50</td>'), (17, '<td style="--share: 50%"></td>')):
        by_class = [[50] * num_experts] * 3 + [[0] * num_experts]
        layer |= {"tokens_per_expert": [150] * num_experts, "class_by_expert": by_class}
        layer["tokens_per_class"] = [100, 100, 100, 0]
        (run_folder / "result.json").write_text(json.dumps(result))
        page = write_report(run_folder).read_text()
        assert page.count(cell) == 3 * num_experts
        assert page.count('<td class="none">') == len(CLASSES) + num_experts  # the last class has no images


def test_a_dense_run_on_named_hardware_without_what_older_runs_did_not_write(run_folder, result):
    for name in ("data", "changes", "command", "finished"):
        del result[name]
    (run_folder / "metrics.jsonl").unlink()
    (run_folder / "result.json").write_text(json.dumps(result | {"layers": {}, "hardware": "a big <machine>"}))
    page = Page(write_report(run_folder).read_text())
    assert "a big <machine>" in page.texts
    assert page.drawings == []
