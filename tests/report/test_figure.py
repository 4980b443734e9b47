import pytest

from gatewright.report.figure import COLOURS, GRID, legible, new_figure, svg

pytest.importorskip("matplotlib")


def test_a_drawing_takes_its_colours_from_the_page_and_names_no_address():
    figure = new_figure(4, 3)
    axes = figure.add_subplot()
    axes.plot([1, 2], [3, 4], color=COLOURS[1])
    axes.grid(color=GRID)
    text = svg(figure, 'a "line"')
    assert text.startswith('<svg class="chart" role="img" aria-label="a &quot;line&quot;" viewBox=')
    assert text.endswith("</svg>")
    assert "var(--line-1)" in text
    assert "var(--grid)" in text
    assert "currentColor" in text
    assert "http" not in text
    assert "#000000" not in text


def test_a_name_that_no_font_can_show_becomes_its_position():
    shown, fonts = legible(["café", "Katze", "\U0010ff00", "кот"])
    assert shown == ["café", "Katze", "class 2", "кот"]
    assert fonts[0] == "DejaVu Sans"
