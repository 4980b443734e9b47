import math

from gatewright.report.elements import bar, heat_table, pairs, table


def test_what_comes_in_is_text_and_not_html():
    assert "<i>" not in pairs([("<i>", "<i>")])
    assert "<i>" not in heat_table("<i>", ["<i>"], ["<i>"], [[0.5]], [["<i>"]])
    assert "&lt;0.1%" in bar("<0.1%", 0.0004, 1.0)
    assert table(["<i>"], [["<b>1</b>"]]).count("<b>1</b>") == 1  # a cell is HTML already


def test_cells_say_their_share_unless_they_are_many():
    few = heat_table("", ["row"], ["a", "b"], [[0.25, math.nan]], [["25", ""]])
    assert '<td style="--share: 25%">25</td><td class="none">' in few
    many = heat_table("", ["row"], [str(i) for i in range(40)], [[0.9] * 40], [["90"] * 40])
    assert many.count('<td class="dark" style="--share: 90%"></td>') == 40
